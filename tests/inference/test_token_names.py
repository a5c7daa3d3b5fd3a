"""Names of tokens for each kind and number of tokens."""

from modeling_vitcls import ViTCLSConfig
from modeling_vitcls.inference.token_names import get_token_names, get_token_names_by_group


def test_single_tokens_have_no_numbers() -> None:
    assert get_token_names(ViTCLSConfig(num_distillation_tokens=1, num_register_tokens=1)) == [
        "CLS",
        "distillation",
        "register",
    ]
    assert get_token_names_by_group(ViTCLSConfig(num_cls_tokens=2, num_register_tokens=3)) == {
        "cls": ["CLS 1", "CLS 2"],
        "distillation": [],
        "registers": ["register 1", "register 2", "register 3"],
    }


def test_tokens_are_named_by_their_task_or_cell() -> None:
    tasks = {"age": ["young", "old", "dead"], "species": ["cat", "dog"]}
    assert get_token_names(ViTCLSConfig(num_cls_tokens=2, tasks=tasks)) == [
        "CLS age",
        "CLS species",
    ]
    scopes = ["image", [2, 3, 1, 2], [2, 3, 0, 1]]
    assert get_token_names(ViTCLSConfig(num_cls_tokens=3, cls_scopes=scopes)) == [
        "CLS 1",
        "CLS 2 (cell 2, 3 of 2 x 3)",
        "CLS 3 (cell 1, 2 of 2 x 3)",
    ]
