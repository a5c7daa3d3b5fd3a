"""Evaluation: metrics compared with direct computations, every image counted once, saved models and their results.

The real `accelerate launch` starts evaluation_worker.py once on two processes. Its results must equal those of one
process.
"""

import csv
import io
import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import scipy.stats
import sklearn.metrics
import torch
from accelerate import Accelerator
from evaluation_worker import (
    BATCH_SIZE,
    CLASSES,
    NUM_IMAGES,
    SIZES,
    SPACES,
    UNREADABLE,
    build_classifier,
    build_evaluator,
    build_labeled_images,
    evaluate_all,
    evaluate_digits,
    evaluate_frozen_digits,
)
from PIL import Image
from rich.console import Console
from torch import nn
from warm_processes import OFFLINE, run_together

from modeling_vitcls import ViTCLSConfig, ViTCLSForMaskedImageModeling, ViTCLSImageProcessor, ViTCLSModel
from modeling_vitcls.data.augmentation import MaskGenerator
from modeling_vitcls.data.images import EncodedImages, LabeledImages
from modeling_vitcls.data.labels import LabelSpace, get_label_space
from modeling_vitcls.data.sampling import derive_seed
from modeling_vitcls.distributed import build_accelerator
from modeling_vitcls.files import read_json
from modeling_vitcls.inference import evaluate as evaluate_module
from modeling_vitcls.inference import evaluator as evaluator_module
from modeling_vitcls.inference.evaluate import build_progress, evaluate_checkpoint, match_labels
from modeling_vitcls.inference.evaluator import HeldOutBatches
from modeling_vitcls.inference.load_model import load_classifier
from modeling_vitcls.inference.metrics import (
    METRICS,
    MultiLabelMetrics,
    MultiTaskMetrics,
    SingleLabelMetrics,
    compute_wilson_interval,
    drop_large_matrices,
    select_scalars,
)
from modeling_vitcls.options import DataOptions, EvaluateOptions, MaskingOptions
from modeling_vitcls.system import describe_device, get_versions


pytestmark = pytest.mark.usefixtures("fresh_accelerate")

CPU = torch.device("cpu")
NUM_HELD_OUT_DIGITS = 372
MEASURED = ("images_per_second", "seconds", "num_processes", "device")  # differ from run to run


@pytest.fixture(scope="module")
def by_one_process() -> dict[str, Any]:
    """Return the metrics of all scenarios of evaluation_worker.py."""
    return evaluate_all(build_accelerator())


@pytest.fixture(scope="module")
def two_process_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run evaluation_worker.py on two processes; return its folder, which contains the printed text in `stdout`."""
    folder = tmp_path_factory.mktemp("two")
    labels = LabelSpace("single_label_classification", {"label": list("9876543210")})
    model = build_classifier("single")
    config = ViTCLSConfig(**model.config.to_diff_dict() | labels.to_config_values())
    type(model)(config).save_pretrained(folder)
    ViTCLSImageProcessor(size=16).save_pretrained(folder)
    worker = Path(__file__).parents[1] / "helpers" / "evaluation_worker.py"
    run_together(worker, folder, log=folder / "stdout", environment=OFFLINE)
    run_together(worker, folder, "frozen", log=folder / "stdout of frozen", environment=OFFLINE)
    return folder


def compute_outputs(name: str) -> tuple[Any, list[Any]]:
    """Return the model's outputs for all images of a scenario in one batch, and the labels."""
    pictures = build_labeled_images(name)
    processor = ViTCLSImageProcessor(size=16)
    pixel_values = processor(list(pictures.images), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        return build_classifier(name)(pixel_values), list(pictures.labels)


def close(value: float) -> Any:
    return pytest.approx(value, abs=2e-6)


# Metrics -------------------------------------------------------------------------------------------------------------


def calibration_error(logits: torch.Tensor, labels: np.ndarray) -> float:
    """Compute equation 3 of Guo et al. (2017) with 15 bins."""
    confidences, answers = (part.numpy() for part in logits.double().softmax(1).max(1))
    right = answers == labels
    error = 0.0
    for number in range(15):
        inside = (number / 15 <= confidences) & (confidences < (number + 1) / 15)
        if inside.any():
            error += inside.mean() * abs(right[inside].mean() - confidences[inside].mean())
    return error


@pytest.mark.filterwarnings("ignore:y_pred contains classes not in y_true")
def test_single_label_metrics(by_one_process: dict[str, Any]) -> None:
    metrics = by_one_process["single"]
    outputs, labels = compute_outputs("single")
    labels = np.array(labels)
    answers = outputs.logits.argmax(1).numpy()
    right = answers == labels
    assert 0 < right.sum() < NUM_IMAGES
    assert metrics["num_images"] == NUM_IMAGES
    assert metrics["accuracy"] == close(right.mean())
    top_5 = [label in row for label, row in zip(labels, outputs.logits.argsort(1)[:, -5:].tolist(), strict=True)]
    assert metrics["top_5_accuracy"] == close(np.mean(top_5))
    assert metrics["balanced_accuracy"] == close(sklearn.metrics.balanced_accuracy_score(labels, answers))
    assert metrics["calibration_error"] == close(calibration_error(outputs.logits, labels))
    assert metrics["loss"] == close(nn.functional.cross_entropy(outputs.logits, torch.tensor(labels)).item())
    expected = sklearn.metrics.confusion_matrix(labels, answers, labels=range(7))
    assert metrics["confusion_matrix"] == expected.tolist()
    interval = scipy.stats.binomtest(int(right.sum()), NUM_IMAGES).proportion_ci(method="wilson")
    assert metrics["accuracy_interval"] == [close(interval.low), close(interval.high)]
    assert_per_class(metrics["per_class"], np.eye(7)[labels], np.eye(7)[answers])


def assert_per_class(measured: list[dict[str, Any]], truth: np.ndarray, answers: np.ndarray) -> None:
    """Check recall, precision and F1 of each class, for 0 or 1 per image and class [N, L]; None for 0 / 0."""
    expected = sklearn.metrics.precision_recall_fscore_support(truth, answers, zero_division=np.nan)
    assert [row["name"] for row in measured] == CLASSES
    for row, precision, recall, f1, support in zip(measured, *expected, strict=True):
        assert row["images"] == support
        for key, value in (("precision", precision), ("recall", recall), ("f1", f1)):
            assert row[key] == (None if np.isnan(value) else close(value)), (row, key)


def test_each_head_has_its_own_metrics(by_one_process: dict[str, Any]) -> None:
    outputs, labels = compute_outputs("single")
    for name in ("cls", "distillation"):
        right = outputs[f"{name}_logits"].argmax(1) == torch.tensor(labels)
        assert by_one_process["single"][f"{name}_accuracy"] == close(right.float().mean().item())
    answers = {name: tuple(outputs[f"{name}logits"].argmax(1).tolist()) for name in ("", "cls_", "distillation_")}
    assert len(set(answers.values())) == 3  # otherwise, swapped heads would not be detected


def test_a_model_with_one_head_has_one_accuracy() -> None:
    metrics = SingleLabelMetrics(SPACES["single"], CPU)
    metrics.update(SimpleNamespace(logits=torch.eye(7), distillation_logits=None), torch.arange(7))
    assert "cls_accuracy" not in metrics.compute()


@pytest.mark.filterwarnings("ignore:No positive class")
def test_multi_label_metrics(by_one_process: dict[str, Any]) -> None:
    metrics = by_one_process["multi_label"]
    outputs, labels = compute_outputs("multi_label")
    truth, probabilities = np.array(labels), outputs.logits.sigmoid().numpy()
    answers = (probabilities > 0.5).astype(int)
    precisions = [
        sklearn.metrics.average_precision_score(truth[:, place], probabilities[:, place]) for place in range(6)
    ]
    assert metrics["mean_average_precision"] == close(np.mean(precisions))
    assert metrics["micro_f1"] == close(sklearn.metrics.f1_score(truth, answers, average="micro"))
    assert metrics["macro_f1"] == close(sklearn.metrics.f1_score(truth, answers, average="macro"))
    assert metrics["exact_match"] == close((truth == answers).all(1).mean())
    loss = nn.functional.binary_cross_entropy_with_logits(outputs.logits, torch.tensor(truth, dtype=torch.float32))
    assert metrics["loss"] == close(loss.item())
    assert metrics["num_images"] == NUM_IMAGES
    assert_per_class(metrics["per_class"], truth, answers)
    measured = [row["average_precision"] for row in metrics["per_class"]]
    assert measured == [*map(close, precisions), None]  # no image has the last class


def test_exact_match_requires_every_class() -> None:
    metrics = MultiLabelMetrics(LabelSpace("multi_label_classification", {"label": ["a", "b"]}), CPU)
    logits = torch.tensor([[0.2, -1.0], [3.0, 0.9], [0.0, -2.0], [1.0, 1.0]])  # 0 is not above a probability of 0.5
    metrics.update(SimpleNamespace(logits=logits), torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 0.0], [0.0, 0.0]]))
    assert metrics.compute()["exact_match"] == 0.5


def test_multi_task_metrics(by_one_process: dict[str, Any]) -> None:
    metrics = by_one_process["multi_task"]
    outputs, labels = compute_outputs("multi_task")
    accuracies, losses = [], []
    for task, names in SPACES["multi_task"].columns.items():
        truth = torch.tensor([label[task] for label in labels])
        known = truth != -100
        right = outputs.logits[task].argmax(1)[known] == truth[known]
        accuracies.append(right.float().mean().item())
        losses.append(nn.functional.cross_entropy(outputs.logits[task][known], truth[known]).item())
        assert metrics[f"{task}_num_images"] == len(right)
        assert metrics[f"{task}_accuracy"] == close(accuracies[-1])
        assert metrics[f"{task}_loss"] == close(losses[-1])
        assert [row["name"] for row in metrics[f"{task}_per_class"]] == names
        assert np.sum(metrics[f"{task}_confusion_matrix"]) == len(right)
    assert metrics["species_num_images"] < metrics["age_num_images"] == metrics["num_images"] == NUM_IMAGES
    assert metrics["accuracy"] == close(np.mean(accuracies))
    assert metrics["loss"] == close(sum(losses))


def test_numbers_come_first_and_the_first_one_compares_models(by_one_process: dict[str, Any]) -> None:
    for name, first in (("single", "accuracy"), ("multi_label", "mean_average_precision"), ("multi_task", "accuracy")):
        metrics = by_one_process[name]
        numbers = select_scalars(metrics)
        assert next(iter(numbers)) == first
        assert list(metrics)[: len(numbers)] == list(numbers)
        assert "num_broken_images" in numbers and not any(isinstance(value, list) for value in numbers.values())
        assert not re.search(r"\.\d{7}", json.dumps(metrics, allow_nan=False))  # at most six decimals


@pytest.mark.parametrize(("num_right", "num_images"), [(0, 7), (7, 7), (353, 360), (1, 2)])
def test_wilson_interval(num_right: int, num_images: int) -> None:
    expected = scipy.stats.binomtest(num_right, num_images).proportion_ci(method="wilson")
    assert compute_wilson_interval(num_right, num_images) == pytest.approx([expected.low, expected.high], abs=1e-12)
    assert compute_wilson_interval(0, 0) is None


def test_logits_between_0_and_1_are_not_interpreted_as_probabilities() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.rand(40, 7, generator=generator), torch.randint(7, (40,), generator=generator)
    metrics = SingleLabelMetrics(SPACES["single"], CPU)
    metrics.update(SimpleNamespace(logits=logits, distillation_logits=None), labels)
    assert metrics.compute()["calibration_error"] == close(calibration_error(logits, labels.numpy()))


def test_many_classes_have_no_matrix_and_few_have_no_top_5() -> None:
    for num_classes, has_matrix, has_top_5 in (
        (1001, False, True),
        (1000, True, True),
        (6, True, True),
        (5, True, False),
    ):
        space = LabelSpace("single_label_classification", {"label": list(map(str, range(num_classes)))})
        metrics = SingleLabelMetrics(space, CPU)
        logits = torch.zeros(2, num_classes)
        metrics.update(SimpleNamespace(logits=logits, distillation_logits=None), torch.tensor([0, 1]))
        values = metrics.compute()
        assert ("confusion_matrix" in values, "top_5_accuracy" in values) == (has_matrix, has_top_5)
        assert (values["accuracy"], len(values["per_class"])) == (0.5, num_classes)


def test_a_task_without_labeled_images_has_no_effect() -> None:
    space = LabelSpace("multi_task", {"age": ["old", "young"], "species": CLASSES})
    metrics = MultiTaskMetrics(space, CPU)
    logits = {"age": torch.tensor([[2.0, 1.0], [0.0, 3.0], [1.0, 0.0]]), "species": torch.zeros(3, 7)}
    labels = {"age": torch.tensor([0, 0, -100]), "species": torch.full((3,), -100)}
    metrics.update(SimpleNamespace(logits=logits), labels)
    values = metrics.compute()
    assert (values["accuracy"], values["age_accuracy"], values.get("species_accuracy")) == (0.5, 0.5, None)
    assert (values["num_images"], values["age_num_images"], values["species_num_images"]) == (3, 2, 0)
    loss = nn.functional.cross_entropy(logits["age"][:2], labels["age"][:2]).item()
    assert values["loss"] == close(loss) == values["age_loss"]


def test_means_of_many_batches_are_exact() -> None:
    """In float32, the mean of many small batches would be inexact."""
    metrics = MultiLabelMetrics(LabelSpace("multi_label_classification", {"label": ["a"]}), CPU)
    logits = torch.full((1, 1), 0.1)
    for _ in range(300):
        metrics.update(SimpleNamespace(logits=logits), torch.ones(1, 1))
    loss = nn.functional.binary_cross_entropy_with_logits(logits, torch.ones(1, 1)).item()
    assert metrics.compute()["loss"] == pytest.approx(loss, rel=1e-12)


def test_a_single_class_has_all_metrics() -> None:
    """A dataset may have one tag, or a task with one class. torchmetrics returns scalars for one class."""
    tags = MultiLabelMetrics(LabelSpace("multi_label_classification", {"label": ["a"]}), CPU)
    logits, labels = torch.tensor([[1.0], [-1.0], [2.0]]), torch.tensor([[1.0], [0.0], [0.0]])
    tags.update(SimpleNamespace(logits=logits), labels)
    expected = sklearn.metrics.average_precision_score(labels[:, 0], logits[:, 0])
    assert tags.compute()["mean_average_precision"] == tags.compute()["per_class"][0]["average_precision"] == expected
    tasks = MultiTaskMetrics(LabelSpace("multi_task", {"age": ["old"], "color": ["red", "blue"]}), CPU)
    task_logits = {"age": torch.zeros(2, 1), "color": torch.eye(2)}
    tasks.update(SimpleNamespace(logits=task_logits), {"age": torch.tensor([0, 0]), "color": torch.tensor([1, 1])})
    values = tasks.compute()
    assert (values["age_confusion_matrix"], values["color_confusion_matrix"]) == ([[2]], [[0, 0], [1, 1]])
    assert drop_large_matrices(values) == values


@pytest.mark.parametrize("name", SPACES)
def test_half_precision_logits_are_evaluated_in_float32(name: str) -> None:
    outputs, values = compute_outputs(name)
    kind, found = SPACES[name].kind, []
    labels = evaluator_module.COLLATE_FUNCTIONS[kind](values, SPACES[name])
    for dtype in (torch.bfloat16, torch.float32):
        logits = outputs.logits
        if isinstance(logits, dict):
            logits = {task: each.bfloat16().to(dtype) for task, each in logits.items()}
        else:
            logits = logits.bfloat16().to(dtype)
        metrics = METRICS[kind](SPACES[name], CPU)
        metrics.update(SimpleNamespace(logits=logits, distillation_logits=None), labels)
        found.append(metrics.compute())
    assert found[0] == found[1]


def test_losses_that_are_not_finite_are_none() -> None:
    infinite = torch.zeros(1, 7)
    infinite[0, 1] = -torch.inf
    for logits in (torch.full((1, 7), torch.nan), infinite):
        metrics = SingleLabelMetrics(SPACES["single"], CPU)
        metrics.update(SimpleNamespace(logits=logits, distillation_logits=None), torch.tensor([1]))
        assert metrics.compute()["loss"] is None


# Every image is counted once -----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_processes_equal_one(by_one_process: dict[str, Any], two_process_folder: Path) -> None:
    measured = read_json(two_process_folder / "scenarios.json")
    assert measured.keys() == by_one_process.keys()
    for name, metrics in by_one_process.items():
        assert measured[name] == metrics, name
        assert list(measured[name]) == list(metrics), name


def test_only_the_main_process_prints(two_process_folder: Path) -> None:
    printed = (two_process_folder / "stdout").read_text(encoding="utf-8")
    assert printed.count("each counted once") == 1
    assert printed.count("'11.png'") == 2  # by two evaluators


@pytest.mark.parametrize(
    ("num_images", "batch_size", "num_processes"), [(10, 3, 1), (10, 3, 2), (1, 4, 3), (12, 3, 2)]
)
def test_each_image_is_evaluated_by_one_process(num_images: int, batch_size: int, num_processes: int) -> None:
    pictures = build_labeled_images("single", num_images)
    numbered = LabeledImages(pictures.images, range(num_images))
    processor = ViTCLSImageProcessor(size=16)
    shares = [
        HeldOutBatches(numbered, processor, SPACES["single"], batch_size, process, num_processes)
        for process in range(num_processes)
    ]
    # sharded models require equal numbers of batches on all processes
    assert len({len(share) for share in shares}) == 1
    batches = [share[place] for share in shares for place in range(len(share))]
    assert sorted(label for batch in batches for label in batch.labels.tolist()) == list(range(num_images))
    assert all(len(batch.labels) <= batch_size for batch in batches)


def test_blank_batches_have_the_shape_of_the_model() -> None:
    """Sharded models run a batch also without a readable image."""
    labels = LabelSpace("single_label_classification", {"label": ["a", "b"]})
    sizes = SIZES | {"image_size": (16, 24), "num_channels": 1}
    model = type(build_classifier("single"))(ViTCLSConfig(**sizes, **labels.to_config_values())).eval()
    shapes: list[tuple[int, ...]] = []
    model.register_forward_pre_hook(lambda module, inputs: shapes.append(tuple(inputs[0].shape)))
    file = io.BytesIO()
    Image.new("L", (24, 16)).save(file, "PNG")
    images = EncodedImages([{"path": name, "bytes": file.getvalue()[:end]} for name, end in (("a", None), ("b", 40))])
    processor = ViTCLSImageProcessor(size={"height": 16, "width": 24}, do_convert_rgb=False)
    processor.image_mean = processor.image_std = [0.5]
    evaluator = evaluator_module.Evaluator(
        LabeledImages(images, [0, 1]), processor, labels, 1, 0, Accelerator(cpu=True)
    )
    assert evaluator(model)["num_broken_images"] == 1
    assert shapes == [(1, 1, 16, 24)] * 2


@pytest.mark.parametrize("mixed_precision", ["no", "bf16"])
def test_the_loss_of_masked_patches_is_the_mean_over_images(mixed_precision: str) -> None:
    torch.manual_seed(0)
    model = ViTCLSForMaskedImageModeling(ViTCLSConfig(**SIZES)).eval()
    images, processor = build_labeled_images("single", number=3).images, ViTCLSImageProcessor(size=16)
    accelerator = Accelerator(cpu=True, mixed_precision=mixed_precision)
    masks = MaskGenerator(MaskingOptions(), (2, 2))
    evaluator = evaluator_module.ReconstructionEvaluator(
        images, processor, masks, 5, batch_size=2, num_workers=0, accelerator=accelerator
    )
    losses = []
    for index, pixel_values in enumerate(processor(list(images), return_tensors="pt")["pixel_values"].split(1)):
        mask = masks(1, CPU, torch.Generator().manual_seed(derive_seed(5, index)))
        with torch.no_grad(), accelerator.autocast():
            losses.append(model(pixel_values, bool_masked_pos=mask).loss.item())
    assert evaluator(model) == {
        "reconstruction_loss": pytest.approx(np.mean(losses), abs=1e-5),
        "num_images": 3,
        "num_broken_images": 0,
    }


def test_an_uncounted_image_is_an_error() -> None:
    evaluator = build_evaluator("single", build_accelerator())
    evaluator.batches.loader.dataset.index_ranges.pop()
    words = "counted 12 readable and 0 unreadable images, but expected 13 images in total"
    with pytest.raises(RuntimeError, match=words):
        evaluator(build_classifier("single"))


def test_batches_have_equal_sizes() -> None:
    sizes = []
    model = build_classifier("single")
    model.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    build_evaluator("single", build_accelerator())(model)
    assert sizes == [BATCH_SIZE] * 5


def test_unreadable_images_are_named_once_and_not_counted(by_one_process: dict[str, Any]) -> None:
    said: list[str] = []
    evaluator = build_evaluator(
        "single",
        build_accelerator(),
        build_labeled_images("single", unreadable=UNREADABLE),
        max_broken_images=4,
        warn=said.append,
    )
    model = build_classifier("single")
    metrics = evaluator(model)
    assert (metrics["num_images"], metrics["num_broken_images"]) == (NUM_IMAGES - 4, 4)
    assert [f"'{index}.png'" in line for index, line in zip(UNREADABLE, said, strict=True)] == [True] * 4
    assert evaluator(model) == metrics == by_one_process["unreadable"]
    assert len(said) == 4
    outputs, labels = compute_outputs("single")
    good = [index for index in range(NUM_IMAGES) if index not in UNREADABLE]
    right = outputs.logits.argmax(1)[good] == torch.tensor(labels)[good]
    assert metrics["accuracy"] == close(right.float().mean().item())


def test_too_many_unreadable_images_are_an_error() -> None:
    accelerator = build_accelerator()
    pictures = build_labeled_images("single", unreadable=UNREADABLE)
    evaluator = build_evaluator("single", accelerator, pictures, max_broken_images=3)
    with pytest.raises(
        ValueError, match=r"more than 3 images cannot be read; the last unreadable image: .*'12\.png'"
    ) as raised:
        evaluator(build_classifier("single"))
    assert "\n" not in str(raised.value)
    evaluator = build_evaluator("single", accelerator, build_labeled_images("single", number=2, unreadable=(0, 1)))
    with pytest.raises(ValueError, match="none of the 2 images can be read"):
        evaluator(build_classifier("single"))


def test_color_images_are_unreadable_for_a_gray_model() -> None:
    encoded = []
    for mode in ("L", "RGB", "RGBA", "L"):
        Image.new(mode, (16, 16)).save(file := io.BytesIO(), "PNG")
        encoded.append({"path": f"{mode}.png", "bytes": file.getvalue()})
    pictures = LabeledImages(EncodedImages(encoded), [0, 1, 2, 3])
    processor = ViTCLSImageProcessor(size=16, do_convert_rgb=False, image_mean=0.5, image_std=0.5)
    batch = HeldOutBatches(pictures, processor, SPACES["single"], 4, 0, 1, num_channels=1)[0]
    assert batch.pixel_values is not None and batch.pixel_values.shape == (2, 1, 16, 16)
    assert batch.labels.tolist() == [0, 3]
    assert batch.error_messages == {
        1: "the image 'RGB.png' has 3 channels, but the model requires 1",
        2: "the image 'RGBA.png' has 4 channels, but the model requires 1",
    }


class CountedImages(list):
    """Images that count how often they are loaded."""

    num_reads = 0

    def __getitem__(self, index: Any) -> Any:
        self.num_reads += 1
        return super().__getitem__(index)


@pytest.mark.parametrize(("free_bytes", "num_reads"), [(0, 1), (-1, 3)])
def test_small_datasets_are_preprocessed_once(
    free_bytes: int, num_reads: int, monkeypatch: pytest.MonkeyPatch, by_one_process: dict[str, Any]
) -> None:
    num_bytes = NUM_IMAGES * 3 * 16 * 16 * 4
    monkeypatch.setattr(evaluator_module, "MAX_CACHE_BYTES", num_bytes + free_bytes)
    pictures = build_labeled_images("single")
    counted = CountedImages(pictures.images)
    evaluator = build_evaluator("single", build_accelerator(), LabeledImages(counted, pictures.labels))
    for _ in range(3):
        assert evaluator(build_classifier("single")) == by_one_process["single"]
    assert counted.num_reads == num_reads * NUM_IMAGES


def test_evaluation_draws_no_random_numbers() -> None:
    """Otherwise, training would depend on the steps at which it is evaluated."""
    evaluator = build_evaluator("single", build_accelerator(), num_workers=1)
    model = build_classifier("single")
    before = torch.get_rng_state()
    evaluator(model)
    assert torch.equal(torch.get_rng_state(), before)


def test_mixed_precision(by_one_process: dict[str, Any]) -> None:
    in_float32 = by_one_process["single"]
    metrics = build_evaluator("single", Accelerator(cpu=True, mixed_precision="bf16"))(build_classifier("single"))
    assert metrics["num_images"] == NUM_IMAGES
    assert metrics["loss"] != in_float32["loss"]
    assert metrics["loss"] == pytest.approx(in_float32["loss"], abs=0.05)


def test_a_model_saved_in_half_precision(by_one_process: dict[str, Any]) -> None:
    metrics = build_evaluator("multi_label", build_accelerator())(build_classifier("multi_label").bfloat16())
    assert metrics["loss"] == pytest.approx(by_one_process["multi_label"]["loss"], abs=0.05)


def test_every_kind_of_labels_has_metrics() -> None:
    assert METRICS.keys() == {space.kind for space in SPACES.values()}


# Saved models --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a saved model of each kind."""
    folder = tmp_path_factory.mktemp("models")
    for name in SPACES:
        build_classifier(name).save_pretrained(folder / name)
        ViTCLSImageProcessor(size=16).save_pretrained(folder / name)
    return folder


def write_table(folder: Path, name: str, header: list[str], text: Any) -> Path:
    """Write the images of a scenario and a CSV file with `text(label)` for each label; each image occurs twice."""
    pictures = build_labeled_images(name)
    with (folder / f"{name}.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", *header])
        for index, label in enumerate(pictures.labels):
            pictures.images[index].save(folder / f"{name}{index}.png")
            writer.writerows([[f"{name}{index}.png", *text(label)]] * 2)
    return folder / f"{name}.csv"


def evaluate(model: Path, dataset: object, **data: Any) -> dict[str, Any]:
    """Evaluate the held-out part of a table, and the rest."""
    options = DataOptions(dataset=str(dataset), num_workers=0, held_out_fraction=0.5, **data)
    parts = [
        evaluate_checkpoint(EvaluateOptions(model=str(model), data=options, batch_size=4, split=split))
        for split in ("train", "test")
    ]
    return {name: [part[name] for part in parts] for name in parts[0]}


def average(parts: dict[str, Any], name: str, count: str = "num_images") -> float:
    """Return the mean over images, from the means of the parts."""
    return np.average(parts[name], weights=parts[count])


def test_a_multi_label_model(models: Path, tmp_path: Path, by_one_process: dict[str, Any]) -> None:
    """The names are in another order, and one class is not in the data."""

    def text(label: list[float]) -> list[str]:
        return ["|".join(name for name, value in reversed([*zip(CLASSES, label, strict=True)]) if value)]

    table = write_table(tmp_path, "multi_label", ["tags"], text)
    parts = evaluate(models / "multi_label", table, label_column=("tags",), label_separator="|")
    expected = by_one_process["multi_label"]
    assert sum(parts["num_images"]) == 2 * NUM_IMAGES
    assert average(parts, "loss") == close(expected["loss"])
    assert [row["name"] for row in parts["per_class"][0]] == CLASSES


def test_a_multi_task_model(models: Path, tmp_path: Path, by_one_process: dict[str, Any]) -> None:
    """The columns are in another order, and some labels are missing."""

    def text(label: dict[str, int]) -> list[str]:
        columns = SPACES["multi_task"].columns
        return [columns[task][label[task]] if label[task] >= 0 else "" for task in ("species", "age")]

    table = write_table(tmp_path, "multi_task", ["species", "age"], text)
    parts = evaluate(models / "multi_task", table, label_column=("species", "age"))
    expected = by_one_process["multi_task"]
    assert sum(parts["num_images"]) == 2 * NUM_IMAGES
    for task in ("species", "age"):
        assert sum(parts[f"{task}_num_images"]) == 2 * expected[f"{task}_num_images"]
        assert average(parts, f"{task}_loss", f"{task}_num_images") == close(expected[f"{task}_loss"])
    with pytest.raises(
        ValueError, match="with several tasks with one label each, but the dataset has one label per image"
    ):
        evaluate(models / "multi_task", table, label_column=("age",))


def test_a_single_label_model(
    models: Path, tmp_path: Path, by_one_process: dict[str, Any], capsys: pytest.CaptureFixture
) -> None:
    table = write_table(tmp_path, "single", ["animal"], lambda label: [CLASSES[label]])
    parts = evaluate(models / "single", table, label_column=("animal",))
    assert sum(parts["num_images"]) == 2 * NUM_IMAGES
    for name in ("accuracy", "cls_accuracy", "loss"):
        assert average(parts, name) == close(by_one_process["single"][name])
    assert parts["dataset"] == [str(table)] * 2 and parts["split"] == ["train", "test"]
    printed = capsys.readouterr().out
    assert f"({parts['split'][1]}: {parts['held_out_part'][1]}), each" in printed
    for words in ("each counted once", "Balanced accuracy", "95% interval", "distillation head", "gnu"):
        assert words in printed


def test_the_results_describe_the_evaluation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A gray model classifies gray images of shade 40 * index. A color image is unreadable for this model."""
    names = ["[b]dark", "light"]
    labels = LabelSpace("single_label_classification", {"label": names})
    model = type(build_classifier("single"))(ViTCLSConfig(**SIZES, num_channels=1, **labels.to_config_values())).eval()
    model.save_pretrained(tmp_path / "model")
    processor = ViTCLSImageProcessor(size=16, do_convert_rgb=False, image_mean=0.5, image_std=0.5)
    processor.save_pretrained(tmp_path / "model")
    images = [Image.new("L", (16, 16), 40 * index) for index in range(6)]
    data, output = tmp_path / "data", tmp_path / "results.json"
    for index, image in enumerate([*images, Image.new("RGB", (16, 16))]):
        folder = data / ("validation" if index else "train") / names[index % 2]
        folder.mkdir(parents=True, exist_ok=True)
        image.save(folder / f"{index}.png")
    options = EvaluateOptions(
        str(tmp_path / "model"),
        DataOptions(str(data), num_workers=0, max_broken_images=1),
        split="validation",
        batch_size=4,
        mixed_precision="bf16",
        output=output,
    )
    clock = SimpleNamespace(perf_counter=iter([10.0, 12.0] * 2).__next__, monotonic=lambda: 0.0)
    monkeypatch.setattr(evaluate_module, "time", clock)
    results = evaluate_checkpoint(options)
    assert json.loads(output.read_text(encoding="utf-8")) == results
    accelerator = build_accelerator(mixed_precision="bf16")
    pixel_values = processor(images[1:], return_tensors="pt")["pixel_values"].to(accelerator.device)
    with torch.no_grad(), accelerator.autocast():
        logits = model.to(accelerator.device)(pixel_values).logits.cpu()
    is_correct = (logits.argmax(1) == torch.tensor([1, 0, 1, 0, 1])).tolist()
    light, dark = is_correct[::2], is_correct[1::2]
    assert 0 < sum(is_correct) < 5
    expected = {
        "model": options.model,
        "dataset": str(data),
        "split": "validation",
        "held_out_part": None,
        "images_per_second": 2.5,
        "seconds": 2.0,
        "device": describe_device(accelerator),
        "mixed_precision": "bf16",
        "num_processes": 1,
        "versions": get_versions(),
        "is_recorded_part": None,
        "accuracy": np.mean(is_correct),
        "num_images": 5,
        "num_broken_images": 1,
    }
    assert results | expected == results
    printed = capsys.readouterr().out
    (warning,) = (line for line in printed.splitlines() if line.startswith("WARNING: "))
    assert "[b]dark/6.png' has 3 channels, but the model requires 1" in warning and f"saved {output}" in printed
    assert f"5 images of {data} (validation), each counted once; 2.5 images/s" in printed
    assert "evaluating" not in printed  # no progress lines in the first seconds
    cells = [[cell.strip() for cell in line.split("│")] for line in printed.splitlines()]
    for name, values in (("`[b]dark`", dark), ("`light`", light)):
        assert any(row[1:4] == [name, str(len(values)), f"{np.mean(values):.2%}"] for row in cells), printed
    with pytest.raises(ValueError, match="more than 0 images cannot be read"):
        evaluate_checkpoint(replace(options, data=replace(options.data, max_broken_images=0)))


def test_streamed_images(models: Path, tmp_path: Path, by_one_process: dict[str, Any]) -> None:
    """Streams select their held-out images differently; one of several splits can be evaluated as a whole."""
    (tmp_path / "data").mkdir()
    table = write_table(tmp_path, "single", ["animal"], lambda label: [CLASSES[label]])
    for split in ("train", "test"):
        for index, row in enumerate(csv.DictReader(table.open(encoding="utf-8"))):
            folder = tmp_path / "data" / split / row["animal"]
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{index}.png").symlink_to(tmp_path / row["path"])
    data = DataOptions(dataset=str(tmp_path / "data"), num_workers=0, streaming=True)
    options = EvaluateOptions(model=str(models / "single"), data=data, batch_size=4)
    metrics = evaluate_checkpoint(options)
    assert metrics["num_images"] == 2 * NUM_IMAGES
    assert metrics["loss"] == close(by_one_process["single"]["loss"])


def test_two_processes_evaluate_a_saved_model(two_process_folder: Path) -> None:
    two, one = read_json(two_process_folder / "new" / "digits.json"), evaluate_digits(two_process_folder)
    assert (two["num_processes"], one["num_processes"]) == (2, 1)
    assert two["num_images"] == NUM_HELD_OUT_DIGITS
    assert {**two, **dict.fromkeys(MEASURED)} == {**one, **dict.fromkeys(MEASURED)}
    assert two.keys() >= {"model", "dataset", "split", "images_per_second", "versions", "per_class", "accuracy"}
    printed = (two_process_folder / "stdout").read_text(encoding="utf-8")
    assert f"{two['accuracy']:.2%}" in printed and "digits.json" in printed
    assert [file.name for file in (two_process_folder / "new").iterdir()] == ["digits.json"]  # no partial file


@pytest.mark.slow
def test_two_processes_evaluate_frozen_features(two_process_folder: Path) -> None:
    two, one = read_json(two_process_folder / "frozen.json"), evaluate_frozen_digits(two_process_folder)
    assert (two["num_processes"], one["num_processes"]) == (2, 1)
    assert two["num_images"] == NUM_HELD_OUT_DIGITS
    assert {**two, **dict.fromkeys(MEASURED)} == {**one, **dict.fromkeys(MEASURED)}


@pytest.mark.parametrize(("is_terminal", "shown"), [(True, "100%"), (False, "evaluating: batch 4/5")])
def test_progress(is_terminal: bool, shown: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate_module, "SECONDS_BETWEEN_LINES", 0.0)
    console = Console(file=io.StringIO(), force_terminal=is_terminal)
    accelerator = build_accelerator()
    metrics = build_evaluator("single", accelerator)(build_classifier("single"), build_progress(console, accelerator))
    assert metrics["num_images"] == NUM_IMAGES
    assert shown in console.file.getvalue()
    assert ("\x1b" in console.file.getvalue()) is is_terminal


def test_a_model_without_a_classifier_is_an_error(tmp_path: Path) -> None:
    config = ViTCLSConfig(**build_classifier("multi_label").config.to_diff_dict())
    for model_class in (ViTCLSModel, ViTCLSForMaskedImageModeling):
        model_class(config).save_pretrained(tmp_path)
        with pytest.raises(
            ValueError, match=f"requires a classifier, but .* contains {model_class.__name__}. Fine-tune"
        ):
            evaluate_checkpoint(EvaluateOptions(model=str(tmp_path), data=DataOptions(dataset="digits")))
    build_classifier("single").save_pretrained(tmp_path)
    config = read_json(tmp_path / "config.json")
    for change, words in (
        ({"architectures": None}, "contains a model of unknown class"),
        ({"id2label": {}, "label2id": {}}, "contains ViTCLSForImageClassification"),
        ({"problem_type": "regression"}, "was trained for regression"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config | change), encoding="utf-8")
        with pytest.raises(ValueError, match=f"requires a classifier, but .* {words}"):
            load_classifier("mine", str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "vit"}), encoding="utf-8")
    with pytest.raises(ValueError, match="mine contains a model of type 'vit', not 'vitcls'"):
        load_classifier("mine", str(tmp_path))


def test_labels_of_a_model() -> None:
    for name, space in SPACES.items():
        assert get_label_space(build_classifier(name).config) == space
    for id2label in ({0: "dusk", 1: "noon"}, {1: "noon", 0: "dusk"}):
        assert get_label_space(ViTCLSConfig(id2label=id2label)) == build_single_label_space("dusk", "noon")


# Labels by name ------------------------------------------------------------------------------------------------------


def build_single_label_space(*names: str) -> LabelSpace:
    return LabelSpace("single_label_classification", {"label": list(names)})


def test_labels_are_matched_to_the_model_by_name() -> None:
    pictures = LabeledImages([], [0, 1, 0])
    assert match_labels(
        pictures, build_single_label_space("noon", "dusk"), build_single_label_space("dawn", "dusk", "noon")
    ).labels == [2, 1, 2]
    many = [f"label {index}" for index in range(22)]
    for number, shown in ((20, r", label 19\. Remove"), (21, r", label 19 and 1 more\. Remove")):
        with pytest.raises(ValueError, match=shown):
            match_labels(pictures, build_single_label_space("noon"), build_single_label_space(*many[:number]))
    with pytest.raises(ValueError, match=r"the label 'noon', but the model has only the labels dusk\. Remove"):
        match_labels(pictures, build_single_label_space("noon", "dusk"), build_single_label_space("dusk"))
    # an unused name has no effect
    match_labels(
        replace(pictures, labels=[1]), build_single_label_space("noon", "dusk"), build_single_label_space("dusk")
    )


def test_several_labels_are_matched_by_name() -> None:
    kind = "multi_label_classification"
    given, known = LabelSpace(kind, {"tags": ["b", "c", "a"]}), LabelSpace(kind, {"label": ["a", "b", "d"]})
    matched = match_labels(LabeledImages([], [[1.0, 0.0, 0.0], [1.0, 0.0, 1.0], [0.0, 0.0, 0.0]]), given, known)
    assert matched.labels == [[0.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 0.0]]
    with pytest.raises(ValueError, match="the label 'c', but the model has only the labels"):
        match_labels(LabeledImages([], [[0.0, 1.0, 0.0]]), given, known)


def test_tasks_are_matched_by_name() -> None:
    given = LabelSpace("multi_task", {"b": ["y", "x"], "a": ["q", "p"]})
    known = LabelSpace("multi_task", {"a": ["p", "q"], "b": ["x", "y"]})
    matched = match_labels(LabeledImages([], [{"b": 0, "a": 0}, {"b": -100, "a": 1}]), given, known)
    assert matched.labels == [{"a": 1, "b": 1}, {"a": 0, "b": -100}]
    with pytest.raises(ValueError, match=r"the model has the tasks a, c, but the dataset has b, a. Select"):
        match_labels(LabeledImages([], []), given, LabelSpace("multi_task", {"a": ["p"], "c": ["x"]}))
    with pytest.raises(
        ValueError, match="with one label per image, but the dataset has several tasks with one label each"
    ):
        match_labels(LabeledImages([], []), given, build_single_label_space("a"))
