"""Fine-tuning runs: the command line, the files of a run, and runs of every kind.

A run with batches of 14, and the same run continued in two processes with batches of 7, must agree.
test_accelerate_configs.py starts the real `accelerate launch`. All other runs use the test process.
Single modules are tested in test_batches, ...
"""

import math
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import yaml
from helpers.accelerate_state import reset_accelerate
from helpers.fresh_processes import SCRIPT_ENVIRONMENT, run_python
from helpers.full_disk import limited_file_size
from helpers.photo_folders import write_photos, write_two_colors, write_unequal_photos
from helpers.scripts_in_process import SCRIPTS, run_in_process
from helpers.tiny_models import build_tiny_resnet, raises_one_line, save_with_processor
from helpers.tiny_options import (
    build_tiny_options,
    forget_end,
    prepare_setup,
    read_compared_values,
    read_metrics,
    run_training,
)
from helpers.warm_processes import run_together
from pytest import CaptureFixture, MonkeyPatch, approx
from safetensors.torch import load_file
from torch import nn
from transformers import ViTImageProcessor

from modeling_vitcls import (
    ViTCLSForImageClassification,
    ViTCLSForMultiTaskClassification,
    ViTCLSImageProcessor,
    ViTCLSModel,
    verify_unchanged,
)
from modeling_vitcls.data.sampling import compute_class_weights
from modeling_vitcls.evaluation.evaluator import Evaluator
from modeling_vitcls.hub.model_files import hash_weights
from modeling_vitcls.runtime.errors import RunStopped
from modeling_vitcls.runtime.files import read_json
from modeling_vitcls.training.checkpoints import CheckpointStore
from modeling_vitcls.training.losses import build_objective, compute_single_label_loss
from modeling_vitcls.training.options import FinetuneOptions


RECIPE = SCRIPTS / "recipes/digits.yaml"
NUM_HELD_OUT_DIGITS, NUM_HELD_OUT_COLORS = 359, 10
SHORT_RUN_FLAGS = (
    "--hidden-size 32 --num-hidden-layers 2 --num-attention-heads 2 --intermediate-size 64 "
    "--num-cls-tokens 2 --num-distillation-tokens 1 --model-config cls_pooling=mean --max-steps 7 "
    "--no-report --save-every 5 --keep-checkpoints 2"
)


@pytest.fixture(scope="module")
def recipe_run(color_images: Path, module_path: Path) -> Path:
    """Run a recipe with batches of 14, and two CLS tokens, a distillation token and registers."""
    folder = module_path / "my-model"
    reset_accelerate()
    flags = f"--config {RECIPE} --dataset {color_images} --batch-size 14 {SHORT_RUN_FLAGS}"
    assert run_in_process("finetune.py", *flags.split(), "--output-dir", folder) == 0
    return folder


@pytest.fixture(scope="module")
def color_images(module_path: Path) -> Path:
    return write_two_colors(module_path / "colors", 23)


def tiny_options(output_dir: Path, dataset: object, **flags: Any) -> FinetuneOptions:
    """Return the options of a run of a few steps in this process."""
    settings = {
        "max_steps": 3,
        "batch_size": 8,
        "learning_rate": 3e-3,
    } | flags
    return build_tiny_options(output_dir, dataset, **settings)


def train(output_dir: Path, dataset: object, **others: Any) -> dict[str, Any]:
    """Return the results of such a run."""
    return run_training(tiny_options(output_dir, dataset, **others))


# A run of a recipe --------------------------------------------------------------------------------


def test_run_leaves_results_of_every_held_out_image(recipe_run: Path) -> None:
    results = read_json(recipe_run / "results.json")
    assert results["num_images"] == NUM_HELD_OUT_COLORS
    assert results["selection_metric"] == "accuracy"
    assert results["weights_sha256"] == hash_weights(recipe_run)
    assert results["num_training_images"] == 46 - NUM_HELD_OUT_COLORS
    assert results["steps"] == 7
    assert results["token_layout"] == {"cls": 2, "distillation": 1, "registers": 2, "patches": 16}
    assert results["versions"]["torch"] == torch.__version__
    records = read_metrics(recipe_run)
    evaluated = [record["step"] for record in records if "held_out_accuracy" in record]
    assert evaluated == [3, 6, 7]


def test_two_processes_train_and_evaluate_as_one(recipe_run: Path, tmp_path: Path) -> None:
    """Continue after step 5 with half the batch size.

    The number of held-out images is not a multiple of 2 x 7.
    """
    forget_end(shutil.copytree(recipe_run, tmp_path / "run"), 7)

    paths = f"--config {recipe_run}/config.resolved.yaml --output-dir {tmp_path}/run"
    flags = f"{paths} --batch-size 7 --resume".split()
    printed = run_together("finetune.py", *flags, log=tmp_path / "log")
    # only the main process prints
    assert printed.count(f" on {NUM_HELD_OUT_COLORS} held-out images") == 1
    assert "resumed   after step 5 of 7" in printed

    one = read_json(recipe_run / "results.json")
    two = read_json(tmp_path / "run/results.json")
    assert two["num_processes"] == 2
    assert two["num_images"] == NUM_HELD_OUT_COLORS
    assert two["accuracy"] == one["accuracy"]
    assert two["loss"] == approx(one["loss"], abs=1e-4)
    assert two["weights_sha256"] == hash_weights(tmp_path / "run")

    pairs = [*zip(read_metrics(recipe_run), read_metrics(tmp_path / "run"), strict=True)][-2:]
    for step, (first, second) in zip((6, 7), pairs, strict=True):
        assert second["step"] == first["step"] == step
        assert second["loss"] == approx(first["loss"], abs=1e-4)
        assert second["gradient_norm"] == approx(first["gradient_norm"], rel=1e-3)


# Runs of every kind -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tasks(color_images: Path) -> Path:
    """Return the images with two columns of labels, some missing, and one of several labels."""
    rows = [
        (
            str(path),
            path.parent.name,
            "" if index % 7 == 0 else f"kind {index % 3}",
            f"{path.parent.name}|all",
        )
        for index, path in enumerate(sorted(color_images.glob("*/*.png")))
    ]
    lines = ["image,time,kind,tags", *map(",".join, rows)]
    (color_images.parent / "tasks.csv").write_text("\n".join(lines) + "\n")
    return color_images.parent / "tasks.csv"


def test_several_tasks_are_learned_and_continued_with_the_saved_heads(
    tasks: Path, tmp_path: Path, capsys: CaptureFixture
) -> None:
    results = train(tmp_path, tasks, label_column=("time", "kind"), max_steps=20)
    kind, time = results["tasks"].values()
    assert time["accuracy"] == read_metrics(tmp_path)[-1]["held_out_time_accuracy"] == 1.0
    assert kind["num_images"] < time["num_images"] == results["num_images"]
    assert results["token_layout"]["cls"] == 2
    model = ViTCLSForMultiTaskClassification.from_pretrained(tmp_path)
    assert model.config.task_labels() == {
        "kind": ["kind 0", "kind 1", "kind 2"],
        "time": ["dusk", "noon"],
    }
    flags = {"label_column": ("time", "kind"), "held_out_fraction": 0.4}
    again = train(tmp_path / "again", tasks, model=tmp_path, **flags)

    assert again["tasks"]["time"]["accuracy"] == 1.0  # with the saved heads
    # of the earlier run, which held out other images
    assert "images that measure this run" in capsys.readouterr().out


def test_several_labels_per_image_are_learned(tasks: Path, tmp_path: Path) -> None:
    options = {"label_column": ("tags",), "max_steps": 30}
    results = train(tmp_path, tasks, **options)
    assert results[results["selection_metric"]] == results["mean_average_precision"] == 1.0
    assert results["label_column"] == ["tags"]
    assert results["label_separator"] == "|"
    model = ViTCLSForImageClassification.from_pretrained(tmp_path)
    assert model.config.problem_type == "multi_label_classification"
    assert set(model.config.label2id) == {"all", "dusk", "noon"}


def test_a_preset_of_one_channel_reads_photos_in_gray(color_images: Path, tmp_path: Path) -> None:
    results = train(tmp_path, color_images, model_config={"num_channels": 1}, max_steps=1)
    assert results["num_unreadable_training_images"] == 0
    assert ViTCLSImageProcessor.from_pretrained(tmp_path).image_mean == (0.5,)


def test_unreadable_images_are_named_and_skipped(
    color_images: Path, tmp_path: Path, capsys: CaptureFixture
) -> None:
    folder = shutil.copytree(color_images, tmp_path / "pictures")
    (folder / "noon/3.png").write_bytes(b"no photo")
    (folder / "dusk/2.png").write_bytes((color_images / "dusk/2.png").read_bytes()[:60])
    flags = {
        "save_every": 4,
        "keep_checkpoints": 9,
    }  # the first evaluation is after step 5
    results = train(tmp_path / "out", folder, epochs=2, max_steps=None, num_workers=1, **flags)

    state = read_json(tmp_path / "out/checkpoints/step-00000004/state.json")
    assert (
        len(state["metadata"]["unreadable_images"]) == results["num_unreadable_training_images"] > 0
    )

    output = capsys.readouterr().out
    assert results["num_unreadable_training_images"] + results["num_unreadable_images"] == 2
    assert "noon/3.png" in output
    assert "dusk/2.png" in output
    assert f"{results['num_unreadable_training_images']} of 36 training images could not" in output


def test_answers_that_change_in_the_mirror_are_named(
    tmp_path: Path, capsys: CaptureFixture, monkeypatch: MonkeyPatch
) -> None:
    monkeypatch.setattr("modeling_vitcls.training.steps_run.MAX_MIRRORED", -1)
    train(tmp_path / "out", write_photos(tmp_path / "photos", range(8)), flip=True, max_steps=1)
    assert "change if the images are mirrored" in capsys.readouterr().out


@pytest.fixture(scope="module")
def pretrained(color_images: Path, module_path: Path) -> Path:
    """Return a checkpoint for fine-tuning."""
    train(module_path / "pretrained", "digits", max_steps=2)
    return module_path / "pretrained"


def list_changed_weights(before: Path, after: Path) -> set[str]:
    """Return the names of the weights that differ."""
    old, new = (load_file(folder / "model.safetensors") for folder in (before, after))
    return {name for name in new if name not in old or not torch.equal(old[name], new[name])}


def test_only_new_tokens_and_the_heads_are_trained_on_request(
    pretrained: Path, tmp_path: Path
) -> None:
    flags = {"trainable": "tokens", "num_register_tokens": 6, "max_steps": 3}
    results = train(tmp_path, "digits", model=pretrained, probe=True, **flags)
    assert [*results["token_movement"]] == [f"registers[{index}]" for index in range(6)]
    has_moved = [distance > 0 for distance in results["token_movement"].values()]
    assert has_moved == [False] * 2 + [True] * 4
    changed = list_changed_weights(pretrained, tmp_path)
    others = {name for name in changed if not name.startswith(("classifier.", "class_distance."))}
    assert others == {"vitcls.embeddings.register_tokens"}

    difference = verify_unchanged(pretrained, tmp_path)["difference"]
    old = load_file(pretrained / "model.safetensors")
    changed_and_old = sorted(changed & old.keys())
    assert all(name in difference for name in changed_and_old[:3])
    assert f"the other {len(old) - len(changed_and_old)} tensors are equal" in difference
    record = read_metrics(tmp_path)[-1]
    norms = [record[f"norm_registers[{index}]"] for index in range(2)]
    assert norms == approx(old["vitcls.embeddings.register_tokens"][0].norm(dim=-1).tolist())


def test_the_losses_of_classes_are_weighted_on_request(tmp_path: Path) -> None:
    photos = write_unequal_photos(tmp_path / "photos")
    run = prepare_setup(tiny_options(tmp_path / "out", photos, class_balance="weights"))
    weights = compute_class_weights(run.data.train.labels, 2)
    logits = torch.randn(6, 2)
    labels = torch.tensor([0, 1, 1, 0, 1, 1])
    outputs = SimpleNamespace(logits=logits, cls_logits=logits, distillation_logits=None)
    objective = build_objective(
        run.options,
        run.data,
        teacher=None,
        normalize=Mock(),
        accelerator=run.reporter.accelerator,
    )
    losses = objective(Mock(return_value=outputs), {"pixels": None, "labels": labels})
    assert torch.equal(losses["loss"], compute_single_label_loss(logits, labels, 0.1, weights))


def test_lora_is_merged_into_a_plain_model(pretrained: Path, tmp_path: Path) -> None:
    (pretrained / "README.md").write_text("---\nlicense: mit\n---\n")
    (pretrained / "LICENSE").touch()
    results = train(tmp_path, "digits", trainable="lora", model=pretrained)
    assert (tmp_path / "LICENSE").is_file()
    assert results["provenance"]["license"] == "mit"
    assert results["calibration"] is None  # 30 images are too few
    names = {
        name for name in list_changed_weights(pretrained, tmp_path) if name.endswith("proj.weight")
    }
    assert names == {
        f"vitcls.layers.{layer}.attention.{name}_proj.weight" for layer in (0, 1) for name in "qv"
    }
    num_merged = ViTCLSForImageClassification.from_pretrained(tmp_path).num_parameters()
    # layers, q and v, rank, widths
    assert results["num_parameters"] - num_merged == 2 * 2 * 8 * (32 + 32)


@pytest.fixture(scope="module")
def teacher(module_path: Path) -> Path:
    """Return a small CNN of transformers; its predictions do not matter."""
    processor = ViTImageProcessor(size={"height": 32, "width": 32})
    resnet = build_tiny_resnet("0123456789")
    folder = save_with_processor(resnet, module_path / "teacher", processor)
    (folder / "README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\n")
    return folder


@pytest.mark.parametrize(("kind", "num_tokens"), [("hard", 1), ("soft", 0)])
def test_a_teacher_trains_the_distillation_token_or_without_one_the_only_head(
    teacher: Path, tmp_path: Path, kind: str, num_tokens: int
) -> None:
    flags = {"num_distillation_tokens": num_tokens, "max_steps": 4, "mixup": 0.2}
    results = train(tmp_path, "digits", teacher=str(teacher), distillation=kind, **flags)
    assert results["token_layout"]["distillation"] == num_tokens
    assert ("distillation_accuracy" in results) == bool(num_tokens)
    last = read_metrics(tmp_path)[-1]
    parts = last["label_loss"] / 2 + last["distillation_loss"] / 2
    assert last["loss"] == approx(parts, abs=1e-5)
    assert read_json(tmp_path / "results.json")["teacher_provenance"]["license"] == "cc-by-nc-4.0"


@pytest.mark.parametrize("home", [None, "~"])
def test_images_that_trained_the_teacher_measure_no_student(
    home: str | None, pretrained: Path, tmp_path: Path, monkeypatch: MonkeyPatch
) -> None:
    """Also if its folder is relative to the working directory or the home folder."""
    monkeypatch.chdir(pretrained.parent)
    monkeypatch.setenv("HOME", str(pretrained.parent))
    source = "/".join(filter(None, [home, pretrained.name]))
    assert "accuracy_interval" in read_json(pretrained / "results.json")
    flags = {"teacher": source, "max_steps": 1, "held_out_fraction": 0.5}
    assert "accuracy_interval" not in train(tmp_path, "digits", **flags)


def test_all_options_can_be_combined(tmp_path: Path, monkeypatch: MonkeyPatch) -> None:
    """Combine all options that are possible with one label per image.

    Compiling itself takes a minute.
    """
    compiled: list[nn.Module] = []
    monkeypatch.setattr(nn.Module, "compile", lambda model: compiled.append(model))
    flags = {
        "mixup": 0.4,
        "auto_augment": "rand",
        "augment": {"random_erasing": 0.3, "cutmix": 1.0},
        "class_balance": "weights",
        "layer_decay": 0.7,
        "model_config": {"drop_path_rate": 0.1},
        "gradient_accumulation_steps": 2,
        "mixed_precision": "bf16",
        "pooling": "attention",
        "compile": True,
    }

    results = train(tmp_path, "digits", **flags)
    assert results["mixed_precision"] == "bf16"
    assert math.isfinite(results["loss"])
    assert [type(model) for model in compiled] == [ViTCLSForImageClassification]


def test_trackers_get_metrics_with_their_steps_and_the_flags(tmp_path: Path) -> None:
    event_files = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    results = train(tmp_path, "digits", log_with=("tensorboard",))
    folder = next((tmp_path / "trackers" / tmp_path.name).rglob("events.out.tfevents*")).parent
    events = event_files.EventAccumulator(str(folder))
    events.Reload()

    assert {"loss", "learning_rate", "held_out_accuracy"} <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3]
    (saved,) = events.Scalars("saved_accuracy")
    assert saved.value == approx(results["accuracy"])

    flags = yaml.safe_load(next((tmp_path / "trackers").rglob("hparams.yml")).read_text())
    assert flags["learning_rate"] == 0.003
    assert flags["log_with"] == "tensorboard"
    assert flags["group_column"] == "unset"


# Errors -------------------------------------------------------------------------------------------


def test_a_failed_evaluation_is_repeated(tmp_path: Path, monkeypatch: MonkeyPatch) -> None:
    """A disk may be removed, or a cluster may not wait for the evaluation."""
    settings = {"max_steps": 6, "batch_size": 80}  # three steps per epoch
    train(tmp_path / "whole", "digits", **settings)
    evaluate = Evaluator.__call__

    monkeypatch.setattr(Evaluator, "__call__", Mock(side_effect=OSError("the disk is gone")))
    with pytest.raises(OSError, match="the disk is gone"):
        train(tmp_path / "cut", "digits", **settings)

    monkeypatch.setattr(Evaluator, "__call__", evaluate)
    assert (tmp_path / "cut/checkpoints/step-00000003").is_dir()
    # killed after it was logged
    (tmp_path / "cut/metrics.jsonl").open("a").write('{"step": 3}\n{"step": 4, "lo')
    train(tmp_path / "cut", "digits", resume=True, **settings)

    found = read_compared_values(tmp_path / "cut")
    assert found == read_compared_values(tmp_path / "whole")
    assert [record["step"] for record in found[1:]] == [1, 2, 3, 4, 5, 6]


def test_a_model_that_cannot_be_written_is_a_one_line_error(
    tmp_path: Path, monkeypatch: MonkeyPatch
) -> None:
    # the checkpoint is also too large
    monkeypatch.setattr(CheckpointStore, "save", lambda *arguments: None)
    words = ("cannot write the model to", "File too large", "`resume=True`")
    with limited_file_size(100_000), raises_one_line(*words, error=RunStopped):
        train(tmp_path, "digits")


@pytest.mark.slow
def test_the_demo_trains_and_loads_a_model(tmp_path: Path) -> None:
    """With few epochs."""
    command = [SCRIPTS / "demo.py", "--output-dir", tmp_path, "--epochs", 8]
    run_python(*command, environment=os.environ | SCRIPT_ENVIRONMENT)
    results = read_json(tmp_path / "results.json")
    assert results["num_images"] == NUM_HELD_OUT_DIGITS
    assert results["accuracy"] >= 0.5


def test_training_computes_what_the_head_reads_in_the_last_layer(
    tmp_path: Path, monkeypatch: MonkeyPatch
) -> None:
    counts = []
    forward = ViTCLSModel.forward

    def count(self: ViTCLSModel, *args: Any, **kwargs: Any) -> Any:
        outputs = forward(self, *args, **kwargs)
        if self.training:
            counts.append(outputs.last_hidden_state.shape[1])
        return outputs

    monkeypatch.setattr(ViTCLSModel, "forward", count)
    run_training(build_tiny_options(tmp_path / "run", "digits", max_steps=1, pooling="cls"))
    assert counts == [1]
