"""Commands read a model folder whose files do not belong together, or that would run code."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.command_in_process import fail, run_here
from helpers.photo_folders import write_photos
from helpers.source_checkpoints import build_vit_classifier, save_checkpoint
from helpers.tiny_models import edit_config, edit_weights
from huggingface_hub import constants
from pytest import LogCaptureFixture, MonkeyPatch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from modeling_vitcls.hub.model_files import hash_settings, hash_weights
from modeling_vitcls.inference.features import FrozenEncoder
from modeling_vitcls.runtime.errors import warn_on_first_process
from modeling_vitcls.runtime.files import read_json, write_json


pytestmark = pytest.mark.usefixtures("place")


def add_second_set_of_weights(folder: Path) -> None:
    """Write the same weights as a shard with an index, beside model.safetensors."""
    weights = load_file(folder / "model.safetensors")
    shard = "model-00001-of-00001.safetensors"
    save_file(weights, folder / shard, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights, shard)}
    write_json(folder / "model.safetensors.index.json", index)


def pickle_weights(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def add_prefix(folder: Path, prefix: str) -> None:
    with edit_weights(folder) as weights:
        for name in list(weights):
            weights[prefix + name] = weights.pop(name)


def add_stray_layer(folder: Path) -> None:
    with edit_weights(folder) as weights:
        weights["vitcls.layers.2.mlp.fc1.weight"] = torch.zeros(2)


# Change of a folder -> words of the error.
CHANGES = {
    "registers without a place": (
        lambda folder: edit_config(folder, num_register_tokens=0),
        ("vitcls.embeddings.register_tokens", "config.json"),
    ),
    "a task without a place": (
        lambda folder: edit_config(folder, extra_heads=None),
        ("extra_heads.task_weather.bias", "config.json"),
    ),
    "names of a wrapper": (
        lambda folder: add_prefix(folder, "net.vit."),
        ("such as net.vit.", "If a wrapper"),
    ),
    "a stray layer": (add_stray_layer, ("vitcls.layers.2.mlp.fc1.weight",)),
    "an adapter": (
        lambda folder: (folder / "adapter_config.json").write_text("{}"),
        ("Merge", "remove adapter_config.json"),
    ),
    "two sets of weights": (
        add_second_set_of_weights,
        ("two sets of weights", "model.safetensors.index.json"),
    ),
    "weights of a variant": (
        lambda folder: (folder / "model.safetensors").rename(folder / "model.fp16.safetensors"),
        ("model.fp16.safetensors", "Rename"),
    ),
    "no weights": (
        lambda folder: (folder / "model.safetensors").unlink(),
        ("lacks weights: model.safetensors. Copy",),
    ),
    "truncated weights": (
        lambda folder: os.truncate(folder / "model.safetensors", 3000),
        ("cannot load the weights in model", "Copy the file again"),
    ),
    "weights of another shape": (
        lambda folder: edit_config(folder, intermediate_size=20),
        ("layers.0.mlp.fc1.bias", "[20]"),
    ),
    "pickled weights": (pickle_weights, ("pickled weights", "save_pretrained")),
    "labels that contradict": (
        lambda folder: edit_config(folder, label2id={"cat": 1, "dog": 0}),
        ("label2id", "id2label"),
    ),
    "kernels of a repository": (
        lambda folder: edit_config(folder, attn_implementation="evil-org/evil"),
        ("attn_implementation='evil-org/evil'",),
    ),
    "an attention that is not installed": (
        lambda folder: edit_config(folder, _attn_implementation="flash_attention_2"),
        ("flash_attention_2",),
    ),
    "photos of a copy that was interrupted": (
        lambda folder: (folder / "trained_scenes.npz").touch(),
        ("trained_scenes.npz", "Remove it"),
    ),
    "photos that would fill the memory": (
        lambda folder: np.savez_compressed(folder / "trained_scenes.npz", codes_=np.zeros((9, 9))),
        ("trained_scenes.npz", "compressed"),
    ),
    "quantized weights": (
        lambda folder: edit_config(folder, quantization_config={"quant_method": "torchao"}),
        ("quantization_config",),
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_folder_that_would_give_other_outputs_is_one_line(change: str) -> None:
    spoil, words = CHANGES[change]
    spoil(Path("model"))
    error = fail(*"evaluate --model model --dataset photos --num-workers 0".split())
    assert all(word in error for word in words), error


def test_training_does_not_start_from_weights_without_a_place() -> None:
    edit_config(Path("model"), num_register_tokens=0)
    command = "finetune --model model --dataset photos --output-dir run --num-workers 0"
    assert "register_tokens" in fail(*command.split())


def test_outputs_that_a_program_wanted_and_a_device_that_it_had_do_not_matter() -> None:
    edit_config(Path("model"), return_dict=False, output_hidden_states=True)
    edit_config(Path("model"), "preprocessor_config.json", device="cuda:9")
    assert run_here(*"evaluate --model model --dataset photos --num-workers 0".split()) == 0


@pytest.mark.parametrize("record", ["5", '{"name": "x", "evil": 1}', '{"license_files": 5}'])
def test_a_damaged_provenance_is_an_error_before_classes_are_added(record: str) -> None:
    Path("model", "results.json").write_text(f'{{"provenance": {record}}}')
    error = fail(*"add-class --model model --dataset missing --output-dir new".split())
    assert "Remove it from results.json" in error


@pytest.mark.parametrize(
    "words",
    [
        "add-task --model vit --dataset photos --name kind --output-dir new",
        "add-class --model vit --dataset photos --output-dir new",
        "add-class --model timm:vit_tiny_patch16_224 --dataset photos --output-dir new",
        "verify-unchanged model vit",
        "convert vit new --to transformers",
        "push --model vit --hub-model-id ann/photos",
    ],
)
def test_a_model_of_another_project_is_converted_first(words: str) -> None:
    save_checkpoint(build_vit_classifier(), Path("vit"))
    error = fail(*words.split())
    source = "timm:vit_tiny_patch16_224" if "timm:" in words else "vit"
    assert f"{source} is not a vitcls model" in error
    assert f"vitcls convert {source} " in error


def test_the_hash_of_a_result_is_that_of_the_weights_that_were_read(
    place: Path, monkeypatch: MonkeyPatch
) -> None:
    """The weights are replaced while the images are evaluated."""
    read_weights = hash_weights(place / "model")
    compute_features = FrozenEncoder.compute_features

    def replace_weights(self: FrozenEncoder, *arguments: Any, **keywords: Any) -> Any:
        add_stray_layer(place / "model")
        return compute_features(self, *arguments, **keywords)

    monkeypatch.setattr(FrozenEncoder, "compute_features", replace_weights)
    command = "evaluate --model model --dataset photos --output a.json --num-workers 0"
    assert run_here(*command.split()) == 0
    assert hash_weights(place / "model") != read_weights
    assert read_json(Path("a.json"))["weights_sha256"] == read_weights


def test_weights_that_are_replaced_between_hash_and_load_are_an_error(
    place: Path, monkeypatch: MonkeyPatch
) -> None:
    load = PreTrainedModel.from_pretrained.__func__  # type: ignore[attr-defined]

    def replace_weights(*arguments: Any, **keywords: Any) -> Any:
        add_stray_layer(place / "model")
        return load(*arguments, **keywords)

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", classmethod(replace_weights))
    command = "evaluate --model model --dataset photos --output a.json --num-workers 0"
    assert "weights in model were replaced" in fail(*command.split())
    assert not Path("a.json").exists()


def test_settings_that_were_edited_after_training_are_named(
    caplog: LogCaptureFixture, monkeypatch: MonkeyPatch
) -> None:
    """Also by a push, which then fails because it is offline."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    command = (
        "finetune --model vitcls-tiny --hidden-size 16 --num-hidden-layers 1 --num-attention-heads 2 "
        "--intermediate-size 16 --image-size 16 --patch-size 8 --max-steps 1 --batch-size 4 "
        "--num-workers 0 --no-report --dataset photos --output-dir trained"
    )
    assert run_here(*command.split()) == 0
    warn_on_first_process.cache_clear()
    commands = (
        (0, "evaluate --model trained --dataset photos --num-workers 0"),
        (0, "predict --model trained photos --num-workers 1"),
        (1, "push --model trained --hub-model-id ann/photos"),
    )
    for status, command in commands:
        assert run_here(*command.split()) == status
    assert "after training" not in caplog.text

    edit_config(Path("trained"), distance_threshold=9.0)
    edit_config(Path("trained"), "preprocessor_config.json", do_normalize=False)
    for status, command in commands:
        warn_on_first_process.cache_clear()
        caplog.clear()
        assert run_here(*command.split()) == status
        (line,) = [line for line in caplog.messages if "after training" in line]
        assert line.startswith("config.json and preprocessor_config.json of ")


def test_code_of_a_model_that_is_not_run_is_named(caplog: LogCaptureFixture) -> None:
    with Path("model/modeling_vitcls.py").open("a") as file:
        file.write("# of another version\n")
    warn_on_first_process.cache_clear()
    assert run_here("predict", "--model", "model", "photos") == 0
    assert "model: modeling_vitcls.py differs from modeling_vitcls" in caplog.text


def test_code_of_a_newer_version_is_named(caplog: LogCaptureFixture) -> None:
    edit_config(Path("model"), code_version="99.1.0+1a2b3c4d")
    warn_on_first_process.cache_clear()
    assert run_here("predict", "--model", "model", "photos") == 0
    assert "model has the code of modeling_vitcls 99.1.0+1a2b3c4d, which is newer" in caplog.text
    assert "does not use" not in caplog.text


def test_fields_that_newer_code_saves_at_their_defaults_are_no_edit(
    caplog: LogCaptureFixture,
) -> None:
    values = read_json(Path("model/config.json"))
    default = values.pop("compute_all_tokens")
    write_json(Path("model/config.json"), values)
    write_json(Path("model/results.json"), {"settings_sha256": hash_settings(Path("model"))})
    write_json(Path("model/config.json"), {**values, "compute_all_tokens": default})
    warn_on_first_process.cache_clear()
    run_here("predict", "--model", "model", "photos")
    assert "changed after training" not in caplog.text


@pytest.mark.parametrize("name", ["base", "vitcls-tiny", "timm:mine", "transformers:mine"])
def test_a_folder_wins_over_a_preset_a_built_in_dataset_and_another_project(name: str) -> None:
    """Also if the working folder has one with the name of the split."""
    Path("model").rename(name)
    write_photos(Path("digits/train"), range(8, 16))
    Path("photos").rename("digits/test")
    write_photos(Path("test"), range(1))

    words = f"--model {name} --dataset digits --num-workers 0"
    assert run_here(*f"evaluate {words} --split test --output a.json".split()) == 0
    assert read_json(Path("a.json"))["num_images"] == 16

    steps = "--output-dir run --max-steps 1 --no-report"
    assert run_here(*f"finetune {words} {steps}".split()) == 0
    results = read_json(Path("run/results.json"))
    assert results["num_training_images"] == 16
    assert read_json(Path("run/config.json"))["num_register_tokens"] == 1
