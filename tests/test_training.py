"""Training: the command line, batches, the loop, evaluation, and what a run leaves behind.

Two runs start the real `accelerate launch`: one process with batches of 14, and two with batches of 7. Their metrics
must agree. The rest runs in this process.
"""

import json
import os
import runpy
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import yaml
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from PIL import Image

from modeling_vitcls import ViTCLSConfig, ViTCLSForImageClassification, ViTCLSImageProcessor
from modeling_vitcls.training.augmentation import build_augmentation
from modeling_vitcls.training.batches import BatchPlan, Normaliser, TrainingPictures, training_batches
from modeling_vitcls.training.data import load_evaluation_data, load_training_data
from modeling_vitcls.training.finetune import finetune
from modeling_vitcls.training.run import prepare
from modeling_vitcls.training.loop import TrainingState, train
from modeling_vitcls.training.losses import classification_loss
from modeling_vitcls.training.model import build_model
from modeling_vitcls.training.optimisation import learning_rate_at, parameter_groups
from modeling_vitcls.training.options import (
    AugmentationOptions,
    DataOptions,
    FinetuneOptions,
    ModelOptions,
    TrainingOptions,
)


REPOSITORY = Path(__file__).parents[1]
SCRIPTS = REPOSITORY / "scripts"
RECIPE = SCRIPTS / "recipes" / "digits.yaml"
ENVIRONMENT = os.environ | {
    "PYTHONPATH": str(REPOSITORY),
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "HF_HUB_OFFLINE": "1",
    "COLUMNS": "200",
}
TINY = ModelOptions(
    model="vitcls-tiny",
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=64,
    image_size=32,
    patch_size=16,
    num_register_tokens=2,
)
PLAIN = AugmentationOptions(crop_scale=1.0, flip=False)
NUM_HELD_OUT_DIGITS = 360


def launch(processes: int, script: str, *flags: object) -> subprocess.CompletedProcess:
    """Run a script through the real `accelerate launch` on the CPU; fail with its output unless it succeeds."""
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", processes]
    several = ["--multi_gpu", "--main_process_port", 0] if processes > 1 else []  # the launcher; the devices are CPUs
    command = list(map(str, [*launcher, *several, SCRIPTS / script, *flags]))
    ran = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, check=False)
    assert ran.returncode == 0, f"{ran.stdout}\n{ran.stderr}"
    return ran


def run_script(script: str, *flags: object) -> subprocess.CompletedProcess:
    """Run a script by itself."""
    command = list(map(str, [sys.executable, "-X", "importtime", SCRIPTS / script, *flags]))
    return subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, check=False)


def read_json(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Any:
    """Accelerate keeps its settings in singletons: each test starts without."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process, batches of 14, with two CLS tokens, a distillation token and registers."""
    folder = tmp_path_factory.mktemp("launched") / "my-model"
    sizes = ["--hidden-size", 32, "--num-hidden-layers", 2, "--num-attention-heads", 2, "--intermediate-size", 64]
    tokens = ["--num-cls-tokens", 2, "--num-distillation-tokens", 1, "--cls-pooling", "mean"]
    steps = ["--max-steps", 7, "--batch-size", 14, "--log-every", 2]
    ran = launch(1, "finetune.py", "--config", RECIPE, "--output-dir", folder, *sizes, *tokens, *steps)
    (folder.parent / "stdout").write_text(ran.stdout, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def colours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of images in two classes that are easy to tell apart, of odd sizes and modes."""
    folder = tmp_path_factory.mktemp("colours")
    for index in range(23):
        for name, colour in (("dusk", (20, 20, 90 + 5 * index)), ("noon", (250, 240, 120 + 5 * index))):
            picture = Image.new("RGB", (20 + index, 40 - index), colour)
            (folder / name).mkdir(exist_ok=True)
            picture.convert("RGBA" if index % 2 else "RGB").save(folder / name / f"{index}.png")
    return folder


def tiny_options(output_dir: Path, dataset: object, **training: Any) -> FinetuneOptions:
    """A run of a few steps in this process."""
    return FinetuneOptions(
        output_dir=output_dir,
        data=DataOptions(dataset=str(dataset), num_workers=0),
        model=TINY,
        augmentation=PLAIN,
        training=replace(TrainingOptions(max_steps=3, batch_size=8, learning_rate=3e-3), **training),
    )


# A run through accelerate launch -------------------------------------------------------------------------------------


def test_run_leaves_results_of_every_held_out_image(launched: Path) -> None:
    results = read_json(launched / "results.json")
    assert results["num_images"] == NUM_HELD_OUT_DIGITS
    right = results["accuracy"] * NUM_HELD_OUT_DIGITS
    assert right == pytest.approx(round(right), abs=1e-3)
    assert 0 <= results["accuracy"] <= results["top_5_accuracy"] <= 1
    assert results["num_training_images"] == 1797 - NUM_HELD_OUT_DIGITS
    assert results["steps"] == 7
    assert results["token_layout"] == {"cls": 2, "distillation": 1, "registers": 2, "patches": 16}
    assert results["sequence_length"] == 21
    assert results["versions"]["torch"] == torch.__version__.split("+")[0]


def test_every_special_token_moves(launched: Path) -> None:
    movement = read_json(launched / "results.json")["token_movement"]
    assert movement.keys() == {"cls", "distillation", "registers"}
    assert all(norm > 0 for norm in movement.values())
    assert "WARNING" not in (launched.parent / "stdout").read_text(encoding="utf-8")


def test_metrics_have_one_line_per_logged_step(launched: Path) -> None:
    metrics = read_metrics(launched)
    assert [record["step"] for record in metrics] == [2, 4, 6, 7]
    for record in metrics:
        assert record["loss"] > 0 and record["gradient_norm"] > 0 and record["images_per_second"] > 0
        assert record["epoch"] == pytest.approx(record["step"] * 14 / 1437, abs=1e-4)
    assert metrics[-1]["held_out_accuracy"] == read_json(launched / "results.json")["accuracy"]
    assert "held_out_accuracy" not in metrics[0]


def test_summary_is_printed_first(launched: Path) -> None:
    lines = (launched.parent / "stdout").read_text(encoding="utf-8").splitlines()
    assert [line.split()[0] for line in lines[:5]] == ["data", "model", "tokens", "batches", "device"]
    assert "[ 2 cls | 1 distillation | 2 registers | 16 patches ] = 21" in lines[2]
    assert "14 images a step = 14 x 1 accumulated x 1 process(es); 7 steps" in lines[3]


def test_two_processes_train_and_evaluate_as_one(launched: Path, tmp_path: Path) -> None:
    """From the resolved recipe, with half the batch; 360 images do not divide into rounds of 2 x 7."""
    launch(
        2,
        "finetune.py",
        *("--config", launched / "config.resolved.yaml", "--output-dir", tmp_path, "--batch-size", 7),
    )
    one, two = read_json(launched / "results.json"), read_json(tmp_path / "results.json")
    assert two["num_processes"] == 2
    assert two["num_images"] == NUM_HELD_OUT_DIGITS
    assert two["accuracy"] == one["accuracy"]
    assert two["loss"] == pytest.approx(one["loss"], abs=1e-4)
    for first, second in zip(read_metrics(launched), read_metrics(tmp_path), strict=True):
        assert second["step"] == first["step"]
        assert second["loss"] == pytest.approx(first["loss"], abs=1e-4)
        assert second["gradient_norm"] == pytest.approx(first["gradient_norm"], rel=1e-3)


def test_evaluate_agrees_with_the_run(launched: Path, tmp_path: Path) -> None:
    output = tmp_path / "new" / "evaluation.json"
    flags = ("--model", launched, "--dataset", "digits", "--batch-size", 11, "--num-workers", 0, "--output", output)
    launch(1, "evaluate.py", *flags)
    expected, measured = read_json(launched / "results.json"), read_json(output)
    assert measured["num_images"] == NUM_HELD_OUT_DIGITS
    assert measured["accuracy"] == expected["accuracy"]
    assert measured["loss"] == pytest.approx(expected["loss"], abs=1e-5)
    assert measured["split"] == "test"


def test_the_folder_loads_without_the_package(launched: Path) -> None:
    """The demo's second half, as it would run anywhere, checks the accuracy that results.json claims."""
    ran = subprocess.run(
        [sys.executable, "-P", str(SCRIPTS / "demo_load.py"), str(launched)],
        capture_output=True,
        text=True,
        env={name: value for name, value in ENVIRONMENT.items() if name != "PYTHONPATH"},
        cwd=launched.parent,
        check=False,
    )
    assert ran.returncode == 0, f"{ran.stdout}\n{ran.stderr}"
    assert "on 360 held-out images" in ran.stdout
    assert "equal to what training reported" in ran.stdout


# Flags ---------------------------------------------------------------------------------------------------------------


def test_a_wrong_flag_is_named_before_anything_is_loaded() -> None:
    ran = run_script("finetune.py", "--config", RECIPE, "--output-dir", "unused", "--num-regster-tokens", "4")
    assert ran.returncode == 2
    assert "--num-regster-tokens" in ran.stderr and "--num-register-tokens" in ran.stderr
    assert not any(line.endswith((" torch", " transformers")) for line in ran.stderr.splitlines())


def test_a_wrong_value_is_named() -> None:
    ran = run_script("finetune.py", "--config", RECIPE, "--output-dir", "unused", "--batch-size", "0")
    assert ran.returncode == 2
    assert "--batch-size is 0: set a value 1 or more" in ran.stderr


def test_a_wrong_key_in_a_recipe_is_named(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("dataset: digits\nmodel: vitcls-tiny\nepocs: 3\n", encoding="utf-8")
    ran = run_script("finetune.py", "--config", recipe, "--output-dir", tmp_path)
    assert ran.returncode == 2
    assert "--epocs" in ran.stderr and "--epochs" in ran.stderr


def test_a_missing_recipe_is_named(tmp_path: Path) -> None:
    ran = run_script("finetune.py", "--config", tmp_path / "absent.yaml", "--output-dir", tmp_path)
    assert ran.returncode == 2
    assert "cannot read the recipe" in ran.stderr and "absent.yaml" in ran.stderr


def test_an_impossible_model_ends_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = ["--config", RECIPE, "--output-dir", tmp_path, "--num-cls-tokens", 0]
    monkeypatch.setattr(sys, "argv", list(map(str, ["finetune.py", *flags])))
    monkeypatch.syspath_prepend(SCRIPTS)
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(SCRIPTS / "finetune.py"), run_name="__main__")
    assert str(stopped.value).startswith('error: pooling="cls" reads a CLS token')
    assert "\n" not in str(stopped.value)  # a message in place of a number: Python prints it and exits with 1


# Data ----------------------------------------------------------------------------------------------------------------


def test_image_folder_is_learned(colours: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    results = finetune(prepare(tiny_options(tmp_path, colours, max_steps=20)))
    assert results["accuracy"] == 1.0
    assert results["num_images"] == 10  # 20 % of 46, rounded up
    config = ViTCLSConfig.from_pretrained(tmp_path)
    assert config.id2label == {0: "dusk", 1: "noon"}
    assert "100.00% of 10 held-out images" in capsys.readouterr().out


def test_csv_with_relative_paths_and_named_labels(colours: Path, tmp_path: Path) -> None:
    lines = [f"{path.relative_to(colours)},{path.parent.name}" for path in sorted(colours.glob("*/*.png"))]
    (colours / "list.csv").write_text("path,category\n" + "\n".join(lines), encoding="utf-8")
    results = finetune(prepare(tiny_options(tmp_path, colours / "list.csv")))
    assert results["num_images"] == 10
    assert results["dataset"] == "list.csv"
    assert ViTCLSConfig.from_pretrained(tmp_path).label2id == {"dusk": 0, "noon": 1}


def test_parquet_with_embedded_images_and_numbered_labels(colours: Path, tmp_path: Path) -> None:
    paths = sorted(colours.glob("*/*.png"))
    rows = {
        "photo": [str(path) for path in paths],
        "extra": [0] * 46,
        "target": [7 if "noon" in str(path) else 3 for path in paths],
    }
    table = datasets.Dataset.from_dict(rows).cast_column("photo", datasets.Image())
    table.to_parquet(tmp_path / "table.parquet")
    results = finetune(prepare(tiny_options(tmp_path / "model", tmp_path / "table.parquet")))
    assert results["num_images"] == 10
    assert ViTCLSConfig.from_pretrained(tmp_path / "model").id2label == {0: "3", 1: "7"}


def test_declared_labels_are_indices_whatever_their_names(colours: Path, tmp_path: Path) -> None:
    paths = sorted(map(str, colours.glob("*/*.png")))
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["1", "0"])})
    rows = {"image": paths, "label": [int("noon" in path) for path in paths]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "table.parquet")
    names, held_out = load_evaluation_data(DataOptions(dataset=str(tmp_path / "table.parquet")), "test")
    assert names == ["1", "0"]
    for picture, label in zip(held_out.pictures, held_out.labels, strict=True):
        assert (picture.convert("RGB").getpixel((0, 0))[0] > 128) == (label == 1)


def test_a_row_without_a_label_is_named(colours: Path, tmp_path: Path) -> None:
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    path = str(next(colours.glob("*/*.png")))
    rows = {"image": [path] * 3, "label": [0, 1, -1]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "table.parquet")
    with pytest.raises(ValueError, match="row 2 has the label -1, which is none of the 2 classes"):
        load_training_data(DataOptions(dataset=str(tmp_path / "table.parquet")))


def test_a_split_of_the_data_set_is_used_where_there_is_one(colours: Path, tmp_path: Path) -> None:
    for split, names in (("train", range(20)), ("test", range(20, 23))):
        for label in ("dusk", "noon"):
            (tmp_path / split / label).mkdir(parents=True)
            for name in names:
                (tmp_path / split / label / f"{name}.png").symlink_to(colours / label / f"{name}.png")
    options = DataOptions(dataset=str(tmp_path))
    data = load_training_data(options)
    assert (len(data.train), len(data.held_out), data.held_out_name) == (40, 6, "split 'test'")
    assert len(load_evaluation_data(options, "test")[1]) == 6
    with pytest.raises(ValueError, match="no split 'tset': choose one of train, test"):
        load_evaluation_data(options, "tset")


def test_held_out_digits_are_stratified_and_disjoint_from_training() -> None:
    data = load_training_data(DataOptions(dataset="digits"))
    assert len(set(data.train.pictures.indices) & set(data.held_out.pictures.indices)) == 0
    assert len(data.train) + len(data.held_out) == 1797
    assert set(Counter(data.held_out.labels).values()) <= {35, 36, 37}
    again = load_training_data(DataOptions(dataset="digits"))
    assert again.held_out.pictures.indices == data.held_out.pictures.indices
    other = load_training_data(DataOptions(dataset="digits", split_seed=1))
    assert other.held_out.pictures.indices != data.held_out.pictures.indices


def test_data_that_cannot_be_used_is_named(colours: Path, tmp_path: Path) -> None:
    (tmp_path / "table.csv").write_text("a,b,c\n1,2,3\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"no column is clearly the image .*--image-column"):
        load_training_data(DataOptions(dataset=str(tmp_path / "table.csv")))
    with pytest.raises(ValueError, match="has no column 'd': choose one of a, b, c"):
        load_training_data(DataOptions(dataset=str(tmp_path / "table.csv"), image_column="d"))
    with pytest.raises(ValueError, match="cannot read the data set"):
        load_training_data(DataOptions(dataset=str(tmp_path / "absent.csv")))
    (tmp_path / "list.csv").write_text("image,label\nabsent.png,x\nabsent.png,x\nabsent.png,x\n", encoding="utf-8")
    data = load_training_data(DataOptions(dataset=str(tmp_path / "list.csv"), held_out_fraction=0.4))
    with pytest.raises(ValueError, match=r"absent\.png"):
        data.train.pictures[0]


# Batches -------------------------------------------------------------------------------------------------------------


def test_every_epoch_shows_each_picture_once() -> None:
    options = TrainingOptions(epochs=3, batch_size=4)
    plan = BatchPlan.from_options(10, options, num_processes=1)
    keys = [key for batch in plan.batches(process=0) for key in batch]
    assert plan.num_steps == 8  # 3 x 10 images in batches of 4, rounded up
    for epoch in range(3):
        assert sorted(index for at, index in keys if at == epoch) == list(range(10))
    assert [index for at, index in keys if at == 0] != [index for at, index in keys if at == 1]


def test_batches_are_the_same_however_they_are_divided() -> None:
    whole = BatchPlan.from_options(10, TrainingOptions(max_steps=7, batch_size=8), num_processes=1)
    shared = BatchPlan.from_options(
        10, TrainingOptions(max_steps=7, batch_size=2, gradient_accumulation_steps=2), num_processes=2
    )
    parts = [list(shared.batches(process)) for process in (0, 1)]
    for step, batch in enumerate(whole.batches(process=0)):
        pieces = [key for part in parts for piece in part[2 * step : 2 * step + 2] for key in piece]
        assert sorted(pieces) == sorted(batch)


def test_batches_can_start_anywhere() -> None:
    plan = BatchPlan.from_options(10, TrainingOptions(max_steps=9, batch_size=3), num_processes=1)
    assert list(plan.batches(process=0, first_step=4)) == list(plan.batches(process=0))[4:]


def test_augmentation_depends_on_seed_epoch_and_picture_alone() -> None:
    data = load_training_data(DataOptions(dataset="digits"))
    augmentation = build_augmentation(AugmentationOptions(rotation=20, shift=0.1), (32, 32), 3)

    def pixels(seed: int, epoch: int) -> torch.Tensor:
        torch.rand(1)  # the state of the global generator must not matter
        return TrainingPictures(data.train, augmentation, to_rgb=True, seed=seed)[epoch, 5]["pixels"]

    assert pixels(0, 0).shape == (3, 32, 32)
    assert torch.equal(pixels(0, 0), pixels(0, 0))
    assert not torch.equal(pixels(0, 0), pixels(0, 1))
    assert not torch.equal(pixels(0, 0), pixels(1, 0))


def test_training_pixels_match_the_image_processor() -> None:
    """Without augmentation, training and evaluation see the same values."""
    data = load_training_data(DataOptions(dataset="digits"))
    _, processor = build_model(TINY, data.label_names)
    augmentation = build_augmentation(PLAIN, (32, 32), processor.resample)
    pictures = TrainingPictures(data.train, augmentation, to_rgb=True, seed=0)
    normalise = Normaliser(processor, torch.device("cpu"))
    expected = processor([data.train.pictures[index] for index in range(9)], return_tensors="pt")["pixel_values"]
    measured = normalise(torch.stack([pictures[0, index]["pixels"] for index in range(9)]))
    torch.testing.assert_close(measured, expected, atol=1e-5, rtol=0)


# Optimisation --------------------------------------------------------------------------------------------------------


def trained_weights(batch_size: int, accumulation_steps: int, learning_rate: float = 1e-3) -> dict[str, torch.Tensor]:
    """The weights after four steps on digits; momentum-free SGD, which hides no difference in scale."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    options = TrainingOptions(
        max_steps=4, batch_size=batch_size, gradient_accumulation_steps=accumulation_steps, learning_rate=learning_rate
    )
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulation_steps)
    data = load_training_data(DataOptions(dataset="digits"))
    torch.manual_seed(0)
    model, processor = build_model(TINY, data.label_names)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=1.0))
    plan = BatchPlan.from_options(len(data.train), options, num_processes=1)
    pictures = TrainingPictures(data.train, build_augmentation(PLAIN, (32, 32), 3), to_rgb=True, seed=0)
    state = TrainingState(model, optimizer)
    loss = classification_loss(Normaliser(processor, accelerator.device), label_smoothing=0.1)
    batches = training_batches(pictures, plan, process=0, num_workers=0)
    train(state, batches, loss, plan, options, accelerator, evaluate=dict, log=lambda record: None)
    assert state.step == 4
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def test_accumulation_equals_the_large_batch() -> None:
    large = trained_weights(batch_size=16, accumulation_steps=1)
    small = trained_weights(batch_size=8, accumulation_steps=2)
    start = trained_weights(batch_size=16, accumulation_steps=1, learning_rate=1e-12)
    for name in large:
        torch.testing.assert_close(small[name], large[name], atol=1e-6, rtol=0)
    moved = max((large[name] - start[name]).abs().max().item() for name in large)
    assert moved > 1e-4  # far above the tolerance


def test_only_weights_of_linear_layers_and_patches_decay() -> None:
    model = ViTCLSForImageClassification(
        ViTCLSConfig(
            **TINY.config_values(),
            num_distillation_tokens=1,
            pooling="attention",
            layer_scale_init_value=0.1,
        )
    )
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed, rest = (
        [names[id(parameter)] for parameter in group["params"]] for group in parameter_groups(model, 0.05)
    )
    assert len(decayed) + len(rest) == len(names)
    assert all(name.endswith(".weight") and "norm" not in name for name in decayed)
    for end in (
        "cls_token",
        "distillation_token",
        "register_tokens",
        "position_embeddings.patches",
        "lambda1",
        "probe",
    ):
        assert any(name.endswith(end) for name in rest), end
    assert all(name.endswith("weight") is ("norm" in name) for name in rest if name.endswith("weight"))


def test_learning_rate_rises_then_falls() -> None:
    options = TrainingOptions(learning_rate=1.0, warmup=0.1)
    rates = [learning_rate_at(step, 100, options) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * step for step in range(1, 11)])
    assert rates[10] == 1.0 and rates == [*rates[:10], *sorted(rates[10:], reverse=True)]
    assert 0 < rates[-1] < 0.001
    assert learning_rate_at(0, 1, replace(options, warmup=0.0)) == 1.0


def test_a_token_that_does_not_move_is_named(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run = prepare(tiny_options(tmp_path, "digits"))
    run.model.vitcls.embeddings.register_tokens.requires_grad_(False)
    results = finetune(run)
    output = capsys.readouterr().out
    assert "WARNING: the token registers[0] did not move" in output
    assert "WARNING: the token registers[1] did not move" in output
    assert "cls[0] did not move" not in output
    assert results["token_movement"]["registers"] == 0.0


# Starting from a checkpoint ------------------------------------------------------------------------------------------


def test_a_checkpoint_keeps_its_classifier_for_the_same_labels(launched: Path) -> None:
    saved = ViTCLSForImageClassification.from_pretrained(launched)
    model, processor = build_model(ModelOptions(model=str(launched)), list(saved.config.label2id))
    for name, weight in saved.state_dict().items():
        assert torch.equal(model.state_dict()[name], weight), name
    assert dict(processor.size) == {"height": 32, "width": 32}


def test_a_checkpoint_gets_a_fresh_classifier_for_other_labels(launched: Path) -> None:
    saved = ViTCLSForImageClassification.from_pretrained(launched)
    model, processor = build_model(ModelOptions(model=str(launched), image_size=(48, 64)), ["dusk", "noon"])
    assert model.config.label2id == {"dusk": 0, "noon": 1}
    assert model.classifier.weight.shape == (2, 32) if isinstance(model.classifier, torch.nn.Linear) else True
    assert torch.equal(model.vitcls.layers[0].mlp.fc1.weight, saved.vitcls.layers[0].mlp.fc1.weight)
    assert model.config.image_height_width == (48, 64)
    assert dict(processor.size) == {"height": 48, "width": 64}
    assert model(torch.zeros(1, 3, 48, 64)).logits.shape == (1, 2)


def test_every_trained_parameter_gets_a_gradient(tmp_path: Path) -> None:
    """Also with a mask token, and where the class head alone answers: several processes would wait for the rest."""
    config = ViTCLSConfig(**TINY.config_values(), num_distillation_tokens=1, use_mask_token=True, num_labels=2)
    config.distillation_inference = "cls"
    ViTCLSForImageClassification(config).save_pretrained(tmp_path)
    ViTCLSImageProcessor(size=32).save_pretrained(tmp_path)
    model, processor = build_model(ModelOptions(model=str(tmp_path)), ["dusk", "noon"])
    loss = classification_loss(Normaliser(processor, torch.device("cpu")), label_smoothing=0.0)
    batch = {"pixels": torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8), "labels": torch.tensor([0, 1])}
    loss(model, batch).backward()
    without = [
        name for name, parameter in model.named_parameters() if parameter.requires_grad and parameter.grad is None
    ]
    assert without == []


def test_another_kind_of_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "vit"}', encoding="utf-8")
    with pytest.raises(ValueError, match="holds a model of type 'vit'"):
        build_model(ModelOptions(model=str(tmp_path)), ["a", "b"])


# The recipe ----------------------------------------------------------------------------------------------------------


def test_resolved_recipe_names_every_flag(launched: Path) -> None:
    resolved = yaml.safe_load((launched / "config.resolved.yaml").read_text(encoding="utf-8"))
    recipe = yaml.safe_load(RECIPE.read_text(encoding="utf-8"))
    assert resolved["hidden_size"] == 32 and resolved["batch_size"] == 14  # flags override the file
    assert resolved["learning_rate"] == float(recipe["learning_rate"])
    assert recipe.keys() <= resolved.keys()


@pytest.mark.slow
def test_the_demo_reaches_97_percent(tmp_path: Path) -> None:
    command = [sys.executable, SCRIPTS / "demo.py", "--output-dir", tmp_path]
    ran = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=ENVIRONMENT, check=False)
    assert ran.returncode == 0, f"{ran.stdout}\n{ran.stderr}"
    results = read_json(tmp_path / "results.json")
    assert results["num_images"] == NUM_HELD_OUT_DIGITS
    assert results["accuracy"] >= 0.97
    assert f"accuracy {results['accuracy']:.2%} on 360 held-out images" in ran.stdout
    assert ran.stdout.index("1. Fine-tune") < ran.stdout.index("2. Load it") < ran.stdout.index("Done in")
