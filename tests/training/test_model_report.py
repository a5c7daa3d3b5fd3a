"""Report and card of a finished run: speed, samples, provenance, and the entry of a benchmark."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers.tiny_models import build_tiny_config, randomize
from helpers.tiny_options import build_tiny_options
from huggingface_hub import ModelCard
from PIL import Image

from modeling_vitcls import ViTCLSForImageClassification, ViTCLSImageProcessor
from modeling_vitcls.data.images import LabeledImages, UnreadableImage
from modeling_vitcls.data.labels import UNLABELED, LabelSpace
from modeling_vitcls.hub.provenance import Provenance
from modeling_vitcls.options import PretrainOptions, RunOptions
from modeling_vitcls.training import model_report
from modeling_vitcls.training.model_report import (
    build_model_report,
    build_report_figures,
    get_model_provenance,
    get_teacher_provenance,
    inspect_saved_model,
    measure_inference_speed,
    select_samples,
    warn_on_error,
    write_card,
)


RESULTS = {"selection_metric": "accuracy", "accuracy": 0.75, "num_images": 40, "dataset": "digits", "split": "test"}


class NumberedImages:
    """60 images; the image with index i has the color (i, 0, 0). Images with an index in `unreadable` are errors."""

    def __init__(self, unreadable: Iterable[int]) -> None:
        self.unreadable = set(unreadable)
        self.read_indices: list[int] = []

    def __len__(self) -> int:
        return 60

    def __getitem__(self, index: int) -> Image.Image:
        self.read_indices.append(index)
        if index in self.unreadable:
            raise UnreadableImage(f"image {index} is unreadable")
        return Image.new("RGB", (4, 4), (index, 0, 0))


def select(labels: list[int], space: LabelSpace, images: Any) -> list[tuple[int, str | None]]:
    """Return the index and the label of each sample."""
    samples = select_samples(LabeledImages(images, labels), space)
    return [(image.getpixel((0, 0))[0], label) for image, label in samples]


def test_samples_are_readable_images_of_different_classes() -> None:
    """The first image of each class comes first, if it is readable. At most 20 images are read."""
    space = LabelSpace("single_label_classification", {"label": ["dusk", "noon", "dawn"]})
    labels = [0, 0, 1, 1, 0, 1, 1, 2, *[2] * 52]
    found = select(labels, space, NumberedImages(unreadable=(0, 4)))
    assert found == [(2, "noon"), (7, "dawn"), (1, "dusk"), (3, "noon")]
    assert select(labels, UNLABELED, NumberedImages(())) == [(index, None) for index in (0, 2, 7, 1)]
    images = NumberedImages(unreadable=range(60))
    assert select(labels, space, images) == []
    assert images.read_indices == [0, 2, 7, 1, 3, 4, 5, 6, *range(8, 20)]


@pytest.mark.parametrize(
    ("seconds_per_image", "batch_size"), [(0.02, 16), (0.001, 32), (10.0, 1)], ids=["some", "many", "one"]
)
def test_the_speed_is_the_median_of_several_batches(
    seconds_per_image: float, batch_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The batch size is limited by the duration of the measurement, 2 s for six batches. One batch is slow."""
    model = ViTCLSForImageClassification(build_tiny_config()).bfloat16().eval()
    now, batches = [0.0], []

    def count(module: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        batches.append(inputs[0])
        now[0] += len(inputs[0]) * seconds_per_image * (7 if len(batches) == 6 else 1)

    model.register_forward_pre_hook(count)
    monkeypatch.setattr(model_report.time, "perf_counter", lambda: now[0])
    found = measure_inference_speed(model, torch.device("cpu"))
    assert [len(batch) for batch in batches] == [1, 1, 1, *[batch_size] * 6]
    assert {batch.dtype for batch in batches} == {torch.bfloat16}
    device = found.pop("device")
    assert device and found == {
        "images_per_second": round(1 / seconds_per_image, 1),
        "batch_size": batch_size,
        "repeats": 5,
        "dtype": "bfloat16",
    }


def test_the_inspection_of_held_out_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every second image is used for the statistics, and two of these images are shown."""
    monkeypatch.setattr(model_report, "NUM_STATISTICS_IMAGES", 4)
    monkeypatch.setattr(model_report, "NUM_REPORT_IMAGES", 2)
    config = build_tiny_config(num_hidden_layers=1, num_register_tokens=1, id2label={0: "dusk", 1: "noon", 2: "dawn"})
    noise = torch.randint(256, (7, 32, 32, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    held_out = LabeledImages([Image.fromarray(pixels.numpy()) for pixels in noise], [0, 1, 2, 0, 1, 2, 0])
    space = LabelSpace("single_label_classification", {"label": ["dusk", "noon", "dawn"]})
    results = RESULTS | {"token_movement": {"cls[0]": 0.5, "registers[0]": 0.25}}
    model = randomize(ViTCLSForImageClassification(config))
    inspection = inspect_saved_model(tmp_path, model, ViTCLSImageProcessor(size=32), results, held_out, space)
    used = {f"held out, {index}": config.id2label[held_out.labels[index]] for index in (0, 2, 4, 6)}
    shown = {report.name: report.truth for report in inspection.image_reports}
    assert len(shown) == 2 and shown.items() <= used.items()
    assert "digits, test" in (tmp_path / "report.html").read_text(encoding="utf-8")
    figures = build_report_figures(inspection, use_samples=True)
    names = {"patch_distance", "norms", "entropy", "mass", "effects"}
    assert figures.keys() == names | {"attention_over_depth"}
    assert build_report_figures(inspection, use_samples=False).keys() == names
    assert len({figures[name].axes[0].get_ylabel() for name in ("patch_distance", "norms", "entropy", "mass")}) == 4


def test_errors_become_warnings_of_one_line() -> None:
    warnings: list[str] = []
    for error in (RuntimeError("no memory\n  left"), AssertionError()):
        with warn_on_error(warnings.append, "no image was drawn"):
            raise error
    assert warnings == ["no image was drawn: no memory left", "no image was drawn: AssertionError"]


def test_without_a_report_only_the_speed_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The report of an earlier run is removed."""
    monkeypatch.setattr(model_report, "MEASUREMENT_SECONDS", 0.0)
    ViTCLSForImageClassification(build_tiny_config()).save_pretrained(tmp_path)
    ViTCLSImageProcessor(size=32).save_pretrained(tmp_path)
    (tmp_path / "report.html").touch()
    results: dict[str, Any] = {}
    none, device = LabeledImages([], []), torch.device("cpu")
    given = (tmp_path, ViTCLSForImageClassification, results, none, UNLABELED, device, False, pytest.fail)
    assert build_model_report(*given) == {}
    assert results.keys() == {"inference"} and not (tmp_path / "report.html").exists()


def test_the_provenance_of_the_model_and_the_teacher(tmp_path: Path) -> None:
    for name in ("start", "teacher"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "README.md").write_text(f"---\nlicense: other\nlicense_name: {name}-terms\n---\n")
    flags = {"model": str(tmp_path / "start"), "teacher": str(tmp_path / "teacher"), "num_distillation_tokens": 1}
    options = build_tiny_options(tmp_path / "run", "digits", **flags)
    model, teacher = get_model_provenance(options), get_teacher_provenance(options)
    assert model is not None and teacher is not None
    assert (model.license_label, teacher.license_label) == ("start-terms", "teacher-terms")
    plain = build_tiny_options(tmp_path / "run", "digits")
    assert get_model_provenance(plain) is None and get_teacher_provenance(plain) is None
    pretraining = build_tiny_options(tmp_path / "run", "digits", PretrainOptions, model=str(tmp_path / "start"))
    assert get_model_provenance(pretraining) == model and get_teacher_provenance(pretraining) is None


def test_the_card_and_the_entry_of_a_benchmark(tmp_path: Path) -> None:
    """A later run without --eval-benchmark removes the entry."""
    options = RunOptions(eval_benchmark="org/benchmark", eval_task_id="top_1", license="mit")
    provenance = Provenance("acme/model", "acme/model", license="apache-2.0")
    file, warnings = tmp_path / ".eval_results" / "results.yaml", []
    for interval, text in ((None, ""), ([0.6, 0.8765], " (95% interval: 0.6000 to 0.8765)")):
        results = RESULTS | {"accuracy_interval": interval}
        write_card(tmp_path, ModelCard("the card"), provenance, results, options, warnings.append)
        (entry,) = yaml.safe_load(file.read_text(encoding="utf-8"))
        assert entry["dataset"] == {"id": "org/benchmark", "task_id": "top_1"} and entry["value"] == 0.75
        assert entry["notes"] == f"accuracy as a fraction{text}, on 40 images of digits (test)"
    assert ModelCard.load(tmp_path / "README.md").text == "the card"
    (warning,) = set(warnings)
    assert warning.startswith("--license mit is ignored: the weights are derived from acme/model")
    write_card(tmp_path, ModelCard("the card"), None, RESULTS, RunOptions(), pytest.fail)
    assert not file.exists()
