"""Prediction: scripts/predict.py and its modules.

Most runs use the test process. Slow tests start real processes: a run that is killed and resumed by
two processes.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas
import pyarrow.parquet as pq
import pytest
import torch
from helpers.command_in_process import check_error
from helpers.photo_folders import draw_pixels, write_files
from helpers.prediction_photos import predict, sorted_photos, write_predictions
from helpers.scripts_in_process import run_in_process
from helpers.tiny_models import (
    PROCESSOR,
    build_random,
    build_tiny_config,
    edit_config,
    raises_one_line,
    randomize,
    save_classifier,
    save_encoder,
    save_with_processor,
)
from helpers.warm_processes import run_together
from numpy.testing import assert_allclose
from PIL import Image
from pytest import CaptureFixture, LogCaptureFixture, MonkeyPatch, approx

from modeling_vitcls import (
    ViTCLSForImageClassification,
    ViTCLSForMaskedImageModeling,
    ViTCLSForMultiTaskClassification,
    ViTCLSImageProcessor,
    ViTCLSModel,
)
from modeling_vitcls.cli import api
from modeling_vitcls.data.images import DatasetImages
from modeling_vitcls.inference.inputs import EQUAL_PIXELS, count_notes
from modeling_vitcls.runtime import distributed


NAMES = ["ant", "bee", "cat"]
LABELS = {"id2label": dict(enumerate(NAMES))}
TOKENS = {"num_cls_tokens": 1, "num_distillation_tokens": 2, "num_register_tokens": 3}
TASKS = {"species": ["ash", "elm", "fir", "oak"], "age": ["young", "old"]}


@pytest.fixture(scope="module")
def models(module_path: Path) -> Path:
    """Return a folder of small models with random weights, one of each kind."""
    save_classifier(module_path / "one_label", *NAMES, **TOKENS)
    kind = {"problem_type": "multi_label_classification"}
    save_classifier(module_path / "several_labels", *NAMES, **kind)
    save_encoder(module_path / "encoder", **TOKENS)
    tasks = ViTCLSForMultiTaskClassification(build_tiny_config(num_cls_tokens=2, tasks=TASKS))
    save_with_processor(tasks, module_path / "several_tasks")
    masked = ViTCLSForMaskedImageModeling(build_tiny_config())
    save_with_processor(masked, module_path / "masked")
    return module_path


@pytest.fixture(scope="module")
def classifier(models: Path) -> Path:
    return models / "one_label"


@pytest.fixture
def unreadable(tmp_path: Path, photos: Path) -> Path:
    """Return a folder with one readable image, a truncated image and a text file."""
    whole = (photos / "a.jpg").read_bytes()
    folder = tmp_path / "broken"
    write_files(folder, "1-whole.jpg", content=whole)
    write_files(folder, "2-cut.jpg", content=whole[: len(whole) // 2])
    write_files(folder, "3-text.png", content=b"no image")
    return folder


def pixel_values(photos: Path) -> torch.Tensor:
    """Return the preprocessed photographs, [9, 3, 32, 32]."""
    return PROCESSOR(sorted_photos(photos), return_tensors="pt")["pixel_values"]


# Labels -------------------------------------------------------------------------------------------


def test_datasets_and_tables_are_read_like_files(
    classifier: Path, photos: Path, tmp_path: Path
) -> None:
    """In memory, as a CSV file of relative paths, and as Parquet with embedded images."""
    files = sorted_photos(photos)
    expected = [(row["label"], row["probability"]) for row in api.predict(classifier, files)]
    dataset = datasets.Dataset.from_dict({"image": files}).cast_column("image", datasets.Image())
    encoded = dataset.cast_column("image", datasets.Image(decode=False))["image"][:]
    lines = [str(Path(file).relative_to(photos)) for file in files]
    (photos / "list.csv").write_text("\n".join(["file_name", *lines]))
    contents = [{"bytes": Path(file).read_bytes(), "path": None} for file in files]
    table = datasets.Dataset.from_dict({"other": [b"x"] * 9, "photo": contents})
    table.cast_column("photo", datasets.Image()).to_parquet(tmp_path / "images.parquet")
    sources: list[dict[str, Any]] = [
        {"images": photos},
        {"images": dataset},
        {"images": encoded},
        {"images": pandas.DataFrame({"image": files, "label": 0})},
        {"dataset": str(photos / "list.csv")},
        {"dataset": tmp_path / "images.parquet", "image_column": "photo"},
    ]
    for source in sources:
        rows = api.predict(classifier, **source)
        assert [(row["label"], row["probability"]) for row in rows] == expected


def test_a_model_without_an_image_processor_has_the_default(
    classifier: Path, photos: Path, tmp_path: Path, caplog: LogCaptureFixture
) -> None:
    """For example after `Trainer.save_model`, or when PEFT's weights are merged."""
    model = shutil.copytree(classifier, tmp_path / "model")
    (model / "preprocessor_config.json").unlink()
    (row,) = api.predict(model, photos / "a.jpg")
    (expected,) = api.predict(classifier, photos / "a.jpg")
    assert row["probability"] == expected["probability"]
    assert "processor.save_pretrained" in caplog.text


def test_the_channels_of_the_model_are_those_of_an_array(tmp_path: Path) -> None:
    model = ViTCLSForImageClassification(build_tiny_config(num_channels=12, **LABELS))
    randomize(model).save_pretrained(tmp_path)
    array = draw_pixels(40, 36, 12)
    last, first, other = api.predict(tmp_path, [array, array.transpose(2, 0, 1), array[..., :7]])
    assert last["probability"] == approx(first["probability"], rel=1e-6)
    assert "[40, 36, 7]" in other["error"]
    assert "12 channels" in other["error"]


def test_a_missing_file_is_named_at_the_end_and_in_the_status(
    classifier: Path, unreadable: Path, tmp_path: Path, capsys: CaptureFixture
) -> None:
    """An unreadable file has a row with the reason, and the status is 0.

    With --strict, or if no image is predicted, the status is 1.
    """
    flags = ["--model", classifier, "--output", tmp_path / "out.json", unreadable]
    assert run_in_process("predict.py", *flags) == 0
    assert capsys.readouterr().out.endswith("out.json: 1 of 3 images predicted\n")
    assert run_in_process("predict.py", *flags, "--num-workers", "0", "--strict") == 1
    check_error(capsys, "2 of the 3 images")
    assert run_in_process("predict.py", *flags, unreadable / "absent.jpg") == 1
    check_error(capsys, f"1 of the 4 images do not exist: {unreadable / 'absent.jpg'}")
    assert len(json.loads((tmp_path / "out.json").read_text())) == 4
    for name in ("1-whole.jpg", "3-text.png"):
        (unreadable / name).unlink()
    assert run_in_process("predict.py", *flags) == 1
    check_error(capsys, "1 of the 1 images")


def test_a_row_notes_what_the_prediction_of_a_scan_does_not_see(
    classifier: Path, tmp_path: Path
) -> None:
    page = Image.new("L", (40, 40), 200)
    page.save(tmp_path / "pages.tiff", save_all=True, append_images=[page, page])
    dark = np.arange(1600, dtype=np.uint16).reshape(40, 40)
    Image.fromarray(dark).save(tmp_path / "dark.png")
    Image.fromarray(dark * 40).save(tmp_path / "scan.tiff")
    Image.new("RGBA", (40, 40), (255, 255, 255, 0)).save(tmp_path / "white.webp")
    rows = api.predict(classifier, tmp_path)
    assert [row["note"] for row in rows] == [
        EQUAL_PIXELS,
        "page 1 of several",
        None,
        EQUAL_PIXELS,
    ]
    images = DatasetImages.from_list([*map(str, tmp_path.iterdir())])
    assert f"2 of 4 images that were looked at: {EQUAL_PIXELS}" in count_notes(images, bit_depth=16)


def test_the_limit_of_megapixels_is_a_flag(
    classifier: Path, photos: Path, tmp_path: Path, monkeypatch: MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    assert api.predict(classifier, photos / "c.png", max_megapixels=1)[0]["error"] is None
    flags = ["--model", classifier, photos / "c.png", "--output", tmp_path / "out.json"]
    assert run_in_process("predict.py", *flags) == 1
    assert run_in_process("predict.py", *flags, "--max-megapixels", "1") == 0


@torch.no_grad()
def test_several_tasks_have_separate_columns(models: Path, photos: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.parquet"
    write_predictions(models / "several_tasks", photos, output, top_k=3, batch_size=5)

    table = pq.read_table(output)
    assert table.column_names[2:6:2] == ["age_label", "age_label_2"]
    assert table.column_names[3:6:2] == ["age_probability", "age_probability_2"]
    assert table.column_names[6:-4:2] == ["species_label", "species_label_2", "species_label_3"]

    model = ViTCLSForMultiTaskClassification.from_pretrained(models / "several_tasks")
    logits = model(pixel_values(photos)).logits
    for task, names in TASKS.items():
        probability, index = logits[task].softmax(dim=1).max(dim=1)
        assert table[f"{task}_label"].to_pylist() == [names[one] for one in index]
        assert_allclose(table[f"{task}_probability"], probability, atol=1e-6)


@torch.no_grad()
def test_several_labels_are_predicted_from_the_threshold(models: Path, photos: Path) -> None:
    model = ViTCLSForImageClassification.from_pretrained(models / "several_labels")
    probabilities = model(pixel_values(photos)).logits.sigmoid()
    threshold = probabilities.median().item()
    rows = predict(model, PROCESSOR, photos, threshold=threshold)

    assert [set(row["labels"]) for row in rows] == [
        {NAMES[label] for label in range(3) if image[label] >= threshold} for image in probabilities
    ]
    assert len({len(row["labels"]) for row in rows}) > 1
    assert all(row["probabilities"] == sorted(row["probabilities"], reverse=True) for row in rows)
    best = predict(model, PROCESSOR, photos, threshold=0, top_k=1)
    assert [row["labels"] for row in best] == [
        [NAMES[label]] for label in probabilities.argmax(dim=1)
    ]


# Features -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "names"),
    [("encoder", ("cls", "cls@1", "mean@2", "patches", "registers")), ("one_label", ("cls",))],
)
@torch.no_grad()
def test_features_of_any_layer_are_those_after_the_final_norm(
    source: str, names: tuple[str, ...], models: Path, photos: Path, tmp_path: Path
) -> None:
    """The last layer is the default. A classifier computes few of its tokens."""
    output = tmp_path / "out.parquet"
    flags = {"features": names, "feature_dtype": "float16"}
    write_predictions(models / source, photos, output, batch_size=9, **flags)
    table = pq.read_table(output)
    assert table.num_rows == len(sorted_photos(photos))
    assert table["error"].null_count == table.num_rows
    model = ViTCLSModel.from_pretrained(models / source)
    outputs = model(pixel_values(photos), output_hidden_states=True)
    first = model.layernorm(outputs.hidden_states[1])
    last = outputs.tokens["patches"]
    expected = {
        "cls": outputs.tokens["cls"][:, 0],
        "cls@1": first[:, 0],
        "mean@2": last.mean(1),
        "patches": last,
        "registers": outputs.tokens["registers"],
    }
    for name in names:
        column = name if len(names) > 1 else "features"
        assert "halffloat" in str(table.schema.field(column).type)
        found = np.array(table[column].to_pylist()).astype(np.float32)
        assert_allclose(found, expected[name].numpy(), rtol=1e-3, atol=1e-5)


def test_the_last_layer_of_a_model_without_a_final_norm_is_its_output(photos: Path) -> None:
    model = ViTCLSModel(build_tiny_config(final_norm=False))
    (row,) = predict(model, PROCESSOR, photos / "a.jpg", features=["cls", "cls@2"])
    assert np.array_equal(row["cls"], row["cls@2"])


@pytest.mark.parametrize(
    ("wrong", "remedy"),
    [
        ("cls@0", "cls@2"),
        ("cls@3", "cls@2"),
        ("registers", "cls, patches, mean"),
        ("token", "cls, patches, mean"),
    ],
)
def test_features_that_the_model_lacks_are_an_error(wrong: str, remedy: str, photos: Path) -> None:
    model = ViTCLSModel(build_tiny_config())
    with raises_one_line(f"`features={wrong!r}`", remedy):
        predict(model, PROCESSOR, photos, features=wrong)


# Inputs -------------------------------------------------------------------------------------------


# Processes -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_processes_write_the_same_file_as_one(
    classifier: Path, photos: Path, unreadable: Path, tmp_path: Path
) -> None:
    flags = ["--model", classifier, photos, unreadable, "--batch-size", 2]
    for processes, name in ((1, "one.csv"), (2, "two.csv")):
        how = {"log": tmp_path / f"{name}.log", "processes": processes}
        printed = run_together("predict.py", *flags, "--output", tmp_path / name, **how)
        assert printed == f"{tmp_path / name}: 10 of 12 images predicted\n"
    assert (tmp_path / "one.csv").read_bytes() == (tmp_path / "two.csv").read_bytes()


# Models -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("encoder", "ViTCLSModel"),
        ("masked", "ViTCLSForMaskedImageModeling"),
        ("lost", "classifier.bias"),
        ("vitcls-tiny", "preset"),
    ],
)
def test_models_without_labels_are_a_one_line_error(
    source: str, words: str, models: Path, photos: Path, monkeypatch: MonkeyPatch
) -> None:
    """The model "lost" is a classifier without the weights of its head."""
    monkeypatch.chdir(models)
    shutil.copytree("encoder", "lost", dirs_exist_ok=True)
    edit_config(Path("lost"), architectures=None)
    with raises_one_line(words):
        api.predict(source, photos)


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"num_labels": 0}, "has no classifier"),
        ({"num_labels": 1, "problem_type": "regression"}, "was trained for regression"),
    ],
)
def test_a_model_without_classes_predicts_no_labels(
    fields: dict[str, Any], problem: str, photos: Path
) -> None:
    model = ViTCLSForImageClassification(build_tiny_config(**fields))
    with raises_one_line(problem, "--features cls"):
        predict(model, PROCESSOR, photos)


# Python function, and flags -----------------------------------------------------------------------


def test_predictions_are_in_bfloat16_where_it_is_faster(
    classifier: Path, photos: Path, monkeypatch: MonkeyPatch
) -> None:
    monkeypatch.setattr(distributed, "has_bfloat16", lambda device: True)
    monkeypatch.setattr(distributed, "MIN_BFLOAT16_WIDTH", 16)
    rows, in_bfloat16, in_float32 = (
        api.predict(classifier, photos, mixed_precision=precision)
        for precision in ("auto", "bf16", "no")
    )
    assert rows == in_bfloat16 != in_float32


def test_images_of_several_shapes_share_a_batch(photos: Path) -> None:
    model = build_random(ViTCLSForImageClassification, **LABELS)
    processor = ViTCLSImageProcessor(size={"shortest_edge": 16})
    together = predict(model, processor, photos, batch_size=9)
    for path, row in zip(sorted_photos(photos), together, strict=True):
        (alone,) = predict(model, processor, path)
        assert alone["label"] == row["label"]
        assert alone["probability"] == approx(row["probability"], abs=1e-5)
