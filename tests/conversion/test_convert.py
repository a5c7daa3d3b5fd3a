"""Test scripts/convert.py: its files, its output, and that a failure writes nothing.

The script runs in this process.
"""

import copy
import hashlib
import io
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers.command_in_process import check_error
from helpers.photo_folders import get_file_names
from helpers.sample_photographs import photograph
from helpers.scripts_in_process import run_in_process
from helpers.source_checkpoints import (
    NAMES,
    SIZES,
    RunWhenUnpickled,
    build_vit_classifier,
    refuses_conversion,
    save_checkpoint,
    save_timm_model,
    save_vit_classifier,
)
from helpers.tiny_models import (
    build_tiny_config,
    edit_weights,
    get_largest_difference,
    raises_one_line,
)
from peers.transformers_cases import CASES
from pytest import CaptureFixture, MonkeyPatch
from safetensors.torch import load_file
from transformers import AutoImageProcessor

from modeling_vitcls import (
    ViTCLSForImageClassification,
    ViTCLSImageProcessor,
    ViTCLSModel,
    convert_from_timm,
)
from modeling_vitcls.conversion import source_models
from modeling_vitcls.conversion.convert import convert_checkpoint, load_source
from modeling_vitcls.conversion.parity_report import compare_models
from modeling_vitcls.conversion.weight_rules import ConversionError
from modeling_vitcls.runtime.files import read_json, write_json
from scripts.tools.random_weights import randomize_weights


LIMIT = 1e-5  # DESIGN.md


def run(*flags: Any) -> str:
    """Run the script in this process and return the printed text."""
    with redirect_stdout(io.StringIO()) as printed:
        assert run_in_process("convert.py", *flags) == 0
    return printed.getvalue()


# The script itself


@pytest.fixture(scope="module")
def from_timm(module_path: Path) -> Path:
    """Return the folder of a converted model of timm."""
    folder = module_path / "not/there"
    source = save_timm_model(module_path / "timm")
    run(source, folder)
    return folder


@pytest.fixture(scope="module")
def from_transformers(module_path: Path) -> Path:
    """Return the folder of a converted checkpoint of transformers, which is beside its `source`."""
    source = save_vit_classifier(module_path / "source")
    run("--model", f"transformers:{source}", "--output", module_path / "converted")
    return module_path / "converted"


def test_a_converted_timm_model_has_all_files(from_timm: Path) -> None:
    assert get_file_names(from_timm) >= {
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
        "parity_report.json",
        "README.md",
        "modeling_vitcls.py",
        "image_processing_vitcls.py",
    }
    # no temporary folder is left
    assert get_file_names(from_timm.parent) == {"there"}
    # other users can read the weights
    assert len({file.stat().st_mode for file in from_timm.iterdir()}) == 1


@torch.no_grad()
def test_a_converted_checkpoint_of_transformers_has_the_same_pixels_and_logits(
    from_transformers: Path,
) -> None:
    source_folder = from_transformers.with_name("source")
    source = transformers.ViTForImageClassification.from_pretrained(source_folder).eval()
    model = ViTCLSForImageClassification.from_pretrained(from_transformers)
    assert model.config.id2label == NAMES

    theirs = AutoImageProcessor.from_pretrained(source_folder)
    ours = AutoImageProcessor.from_pretrained(from_transformers)
    assert type(ours) is ViTCLSImageProcessor
    wanted = theirs(photograph("china.jpg"), return_tensors="pt")
    found = ours(photograph("china.jpg"), return_tensors="pt")
    assert torch.equal(found["pixel_values"], wanted["pixel_values"])

    assert get_largest_difference(model(**found).logits, source(**wanted).logits) <= LIMIT


def test_the_parity_report_has_the_differences_at_two_sizes(
    from_timm: Path, from_transformers: Path
) -> None:
    for folder in (from_timm, from_transformers):
        report = read_json(folder / "parity_report.json")
        weights = (folder / "model.safetensors").read_bytes()
        assert report["sha256"] == {"model.safetensors": hashlib.sha256(weights).hexdigest()}
        assert report["classifier"] == "kept"
        assert report["limit"] == LIMIT
        assert report["versions"].items() >= {"torch": torch.__version__}.items()
        native, rectangle = report["comparisons"]
        for comparison in (native, rectangle):
            assert comparison["differences"].keys() >= {"cls", "patches", "logits"}
            assert all(0 <= value <= LIMIT for value in comparison["differences"].values())
            assert all(value > 0.1 for value in comparison["magnitudes"].values())
        assert native["image_size"][0] == native["image_size"][1]
        assert rectangle["image_size"][0] < rectangle["image_size"][1]


# A wrong conversion writes nothing


def add_to_weight(name: str) -> Callable[[Any], None]:
    """Return a function that adds 1e-3 to one weight."""
    return lambda model: model.get_parameter(name).data.view(-1)[0].add_(1e-3)


def use_bilinear_interpolation(model: Any) -> None:
    """Change the interpolation of positions."""
    positions = model.vitcls.embeddings.position_embeddings
    assert positions.config.position_interpolation == "bicubic"
    assert positions.config.position_antialias
    positions.config = copy.deepcopy(positions.config)
    positions.config.position_interpolation = "bilinear"


WRONG = {
    "a layer": (add_to_weight("vitcls.layers.3.mlp.fc1.bias"), "160 x 160 pixels: cls by"),
    "the classifier": (add_to_weight("classifier.bias"), "160 x 160 pixels: logits by 0.001"),
    "the interpolation": (use_bilinear_interpolation, "112 x 208 pixels: cls by"),
    # comparisons with NaN are always false
    "nan": (lambda model: model.classifier.bias.data.fill_(torch.nan), "logits by nan"),
}


@pytest.mark.parametrize(("spoil", "message"), WRONG.values(), ids=WRONG)
def test_a_wrong_weight_aborts_and_writes_nothing(
    spoil: Callable[[Any], None],
    message: str,
    tmp_path: Path,
    monkeypatch: MonkeyPatch,
    capsys: CaptureFixture,
) -> None:
    def wrong(*args: Any, **kwargs: Any) -> Any:
        model = convert_from_timm(*args, **kwargs)
        spoil(model)
        return model

    monkeypatch.setattr(source_models, "convert_timm_model", wrong)
    source = save_timm_model(tmp_path / "source")
    assert run_in_process("convert.py", source, tmp_path / "deep/made") == 1
    check_error(capsys, message, "1e-05")
    assert get_file_names(tmp_path) == {"source"}


# Sources


def save_encoder(folder: Path, **options: Any) -> str:
    """Save a ViT of transformers with random weights, and return it as a source."""
    model = transformers.ViTModel(transformers.ViTConfig(**SIZES), **options)
    return save_checkpoint(randomize_weights(model), folder)


def test_a_non_square_source_is_compared_at_its_native_size(tmp_path: Path) -> None:
    """transformers does not interpolate non-square grids: only the native size is compared."""
    config = transformers.ViTConfig(**SIZES | {"image_size": [32, 48]})
    source = save_checkpoint(randomize_weights(transformers.ViTModel(config)), tmp_path / "source")

    made = convert_checkpoint(source, tmp_path / "made")

    assert (
        [comparison["image_size"] for comparison in made["comparisons"]]
        == [made["image_size"]]
        == [(32, 48)]
    )
    assert made["not_compared"].startswith("the source does not support 24 x 64 pixels: ")
    assert dict(ViTCLSImageProcessor.from_pretrained(tmp_path / "made").size) == {
        "height": 32,
        "width": 48,
    }


@torch.no_grad()
def test_the_vision_part_of_a_larger_model_is_converted(tmp_path: Path) -> None:
    text = {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
    }
    config = transformers.CLIPConfig(vision_config=SIZES, text_config=text)
    clip = randomize_weights(transformers.CLIPModel(config))

    made = convert_checkpoint(save_checkpoint(clip, tmp_path / "source"), tmp_path / "made")

    assert made["source_class"] == "CLIPVisionModel"
    assert not any("text_model" in note or "does not use" in note for note in made["notes"])

    model = ViTCLSModel.from_pretrained(tmp_path / "made")
    pixel_values = torch.randn(2, 3, 32, 32)
    wanted = clip.vision_model(pixel_values).pooler_output
    assert get_largest_difference(model(pixel_values).pooler_output, wanted) <= LIMIT


def test_the_encoder_of_a_model_with_another_head_is_converted_with_a_note(tmp_path: Path) -> None:
    sizes = SIZES | {"num_hidden_layers": 4, "out_indices": [1, 2, 3, 4]}
    model = randomize_weights(
        transformers.BeitForSemanticSegmentation(transformers.BeitConfig(**sizes))
    )
    made = convert_checkpoint(save_checkpoint(model, tmp_path / "source"), tmp_path / "made")
    assert made["source_class"] == "BeitModel"
    assert any("auxiliary_head" in note for note in made["notes"])


def test_a_missing_pooler_is_not_initialized_and_all_other_weights_are_required(
    tmp_path: Path,
) -> None:
    source = save_encoder(tmp_path / "source", add_pooling_layer=False)
    assert "no pooler" in convert_checkpoint(source, tmp_path / "made")["notes"][0]
    assert ViTCLSModel.from_pretrained(tmp_path / "made").config.pooled_activation is None

    with edit_weights(tmp_path / "source") as weights:
        weights["layernorm.scale"] = weights.pop("layernorm.weight")

    with pytest.raises(
        ConversionError,
        match=r"ViTModel requires 3 weights that are missing .*, for example layernorm\.weight",
    ):
        convert_checkpoint(source, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_pickles_with_code_are_errors(tmp_path: Path) -> None:
    source = save_encoder(tmp_path / "source")
    (tmp_path / "source/model.safetensors").unlink()
    torch.save(
        {"layernorm.weight": RunWhenUnpickled(tmp_path / "ran")},
        tmp_path / "source/pytorch_model.bin",
    )

    with refuses_conversion("a pickle with objects other than tensors", "safetensors"):
        convert_checkpoint(source, tmp_path / "made")

    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("file", ["config.json", "preprocessor_config.json"])
def test_remote_code_is_never_run(file: str, tmp_path: Path, monkeypatch: MonkeyPatch) -> None:
    """transformers must not ask for confirmation on the standard input either."""
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))
    monkeypatch.setattr(
        "builtins.input", lambda *_: pytest.fail("asked whether to run remote code")
    )
    source = save_encoder(tmp_path / "source")
    (tmp_path / "source/evil.py").write_text(
        f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: ...\n"
    )
    references = dict.fromkeys(("AutoConfig", "AutoModel", "AutoImageProcessor"), "evil.Evil")
    settings = {"model_type": "evil", "image_processor_type": "Evil", "auto_map": references}
    path = tmp_path / "source" / file
    write_json(path, (read_json(path) if path.exists() else {}) | settings)

    if file == "config.json":
        with raises_one_line("remote code", error=OSError):
            convert_checkpoint(source, tmp_path / "made")
    else:
        made = convert_checkpoint(source, tmp_path / "made")
        assert "image processor" in made["preprocessing"]["assumed_because"]
    assert not (tmp_path / "ran").exists()
    assert [file.parent.name for file in tmp_path.rglob("evil*")] == ["source"]


def test_half_precision_is_kept_if_conversion_is_exact(tmp_path: Path) -> None:
    source = save_checkpoint(build_vit_classifier().to(torch.bfloat16), tmp_path / "source")
    made = convert_checkpoint(source, tmp_path / "made")
    assert max(made["comparisons"][0]["differences"].values()) <= LIMIT

    written = load_file(tmp_path / "made/model.safetensors").values()
    assert {weight.dtype for weight in written} == {torch.bfloat16}

    source = save_checkpoint(CASES["radio"].build().half(), tmp_path / "radio")
    made = convert_checkpoint(source, tmp_path / "radio made")
    # its normalization of pixels is folded into the patch projection
    assert "written in float32" in made["notes"][0]
    assert set(made["comparisons"][0]["differences"]) == {"cls", "registers", "patches", "pooled"}
    written = load_file(tmp_path / "radio made/model.safetensors").values()
    assert {weight.dtype for weight in written} == {torch.float32}


def test_the_limit_is_relative_to_the_largest_value(tmp_path: Path) -> None:
    """A model with large outputs is converted in spite of rounding errors above 1e-5."""
    aim = CASES["aimv2"].build()
    aim.rms_norm.weight.data.mul_(300)
    report = convert_checkpoint(save_checkpoint(aim, tmp_path / "source"), tmp_path / "made")
    assert max(report["comparisons"][0]["differences"].values()) > 1e-5

    source = load_source(f"transformers:{tmp_path / 'source'}")
    model = source.convert()
    model.layernorm.weight.data.mul_(1 + 3e-5)
    with refuses_conversion("differ", "1e-05"):
        compare_models(source, model)


def save_config(config: transformers.PreTrainedConfig, folder: Path) -> str:
    config.save_pretrained(folder)
    return f"transformers:{folder}"


def write_empty(file: Path) -> str:
    file.touch()
    return str(file)


UNSUPPORTED = {
    "LlavaForConditionalGeneration (model type llava) cannot be converted": lambda folder: (
        save_config(
            transformers.LlavaConfig(architectures=["LlavaForConditionalGeneration"]), folder
        )
    ),
    # without config.json
    "cannot read the configuration of": lambda folder: f"transformers:{folder.parent}",
    "is a file of Keras. Weights of PyTorch": lambda folder: write_empty(folder.with_suffix(".h5")),
    "source 'keras:resnet' is not supported": lambda folder: "keras:resnet",
    "source 'timm:' is not supported": lambda folder: "timm:",
    "ViTCLSModel (model type vitcls) cannot be converted": lambda folder: save_checkpoint(
        ViTCLSModel(build_tiny_config()), folder
    ),
}


@pytest.mark.parametrize("message", UNSUPPORTED)
def test_unsupported_sources_are_one_line_errors_and_write_nothing(
    message: str, tmp_path: Path
) -> None:
    source = UNSUPPORTED[message](tmp_path / "source")
    before = sorted(tmp_path.rglob("*"))
    with raises_one_line(message, error=(ValueError, OSError)):
        convert_checkpoint(source, tmp_path / "made")
    assert sorted(tmp_path.rglob("*")) == before
