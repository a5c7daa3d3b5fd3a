"""`vitcls convert`, in both directions."""

from pathlib import Path

from helpers.command_in_process import run_here
from helpers.source_checkpoints import save_timm_model
from transformers import ViTModel

from modeling_vitcls import ViTCLSModel


def test_a_model_is_converted_forth_and_back_with_a_card(tmp_path: Path) -> None:
    ours = tmp_path / "ours"
    theirs = tmp_path / "theirs"
    source = save_timm_model(tmp_path / "source")
    assert run_here("convert", source, ours) == 0
    assert ViTCLSModel.from_pretrained(ours).config.num_cls_tokens == 1
    assert run_here(*f"convert {ours} {theirs} --to transformers".split()) == 0
    assert ViTModel.from_pretrained(theirs).config.hidden_size == 64
    for folder in (ours, theirs):
        assert (folder / "README.md").is_file()
