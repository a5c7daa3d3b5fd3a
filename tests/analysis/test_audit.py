"""The audit of a dataset: planted errors are found, and the results are cleanlab's."""

import base64
import io
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from helpers.photo_folders import write_photos
from helpers.tiny_models import build_tiny_config, raises_one_line, save_with_processor
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_predict
from sklearn.neighbors import KNeighborsClassifier, NearestNeighbors

from modeling_vitcls import (
    ViTCLSForImageClassification,
    ViTCLSImageProcessor,
    ViTCLSModel,
    evaluate,
)
from modeling_vitcls.analysis import audit as audit_module
from modeling_vitcls.analysis.audit import (
    AuditedImages,
    audit_checkpoint,
    audit_dataset,
    load_audited_images,
    make_thumbnail,
    write_audit,
)
from modeling_vitcls.data.aspect_ratio import set_fit
from modeling_vitcls.data.options import DataOptions
from modeling_vitcls.data.splits import load_training_data, write_splits
from modeling_vitcls.inference.options import EvaluateOptions


pytest.importorskip("cleanlab", reason="cleanlab is in the extras `audit` and `test`")
NUM_FLIPPED, NUM_COPIES = 54, 20  # 3 % of the labels


@pytest.fixture(scope="module")
def planted() -> tuple[AuditedImages, np.ndarray, np.ndarray]:
    """Return digits with wrong labels and darker JPEG copies, and the indices of both."""
    digits = load_digits()
    generator = np.random.default_rng(0)
    images = [Image.fromarray(np.uint8(pixels * 15.9)) for pixels in digits.images]
    labels = digits.target.copy()
    num_images = len(digits.images)
    flipped = generator.choice(num_images, NUM_FLIPPED, replace=False)
    labels[flipped] = (labels[flipped] + generator.integers(1, 10, NUM_FLIPPED)) % 10
    copied = generator.choice(num_images, NUM_COPIES, replace=False)
    for index in copied:
        buffer = io.BytesIO()
        images[index].resize((32, 32)).point(lambda value: int(0.85 * value)).save(
            buffer, "JPEG", quality=90
        )
        images.append(Image.open(buffer).resize((8, 8), Image.Resampling.BOX))
    labels = np.concatenate([labels, labels[copied]])
    features = np.stack([np.asarray(image, float).reshape(-1) for image in images]) / 255
    model = LogisticRegression(C=0.1, max_iter=2000)
    probabilities = cross_val_predict(model, features, labels, cv=5, method="predict_proba")
    audited = AuditedImages(
        ids=[str(index) for index in range(len(images))],
        splits=["train"] * num_images + ["test"] * NUM_COPIES,
        labels=labels,
        probabilities=probabilities,
        features=features,
        pixels=np.stack([make_thumbnail(image) for image in images]),
        sources=[(images, index) for index in range(len(images))],
        names=[f"digit {index}" for index in range(10)],
    )
    return audited, flipped, copied


@pytest.fixture(scope="module")
def audit(planted: tuple[AuditedImages, ...]) -> dict[str, pd.DataFrame]:
    return audit_dataset(planted[0])


def test_planted_duplicates_are_found_and_none_is_invented(
    planted: tuple[AuditedImages, ...], audit: dict[str, pd.DataFrame]
) -> None:
    _, _, copied = planted
    rows = audit["duplicate"]
    across = rows[rows["split"] != rows["other_split"]]

    assert set(zip(across["row"], across["other_row"], strict=True)) == {
        (index, 1797 + number) for number, index in enumerate(copied)
    }
    # of 1,797 digits of 8 x 8 pixels, some of which agree by chance
    assert len(rows) - len(across) <= 5
    assert (
        rows["split"] != rows["other_split"]
    ).is_monotonic_decreasing  # errors of the split come first
    assert across["score"].is_monotonic_increasing
    assert 0 < rows["score"].max() <= 0.1

    few = {name: values[:3] for name, values in vars(planted[0]).items() if name != "names"}
    assert audit_module.find_near_duplicates(
        replace(planted[0], **few)
    ).empty  # fewer images than neighbors


def test_copies_are_found_by_pixels_and_images_without_probabilities_are_not_scored(
    planted: tuple[AuditedImages, ...],
) -> None:
    """Pixels decide, also those of mirrored images.

    Constant images are no duplicates. Images without probabilities have no label score.
    """
    rows = np.tile(np.arange(100), 2)
    arrays = ("labels", "probabilities", "features", "pixels")
    twice = {name: getattr(planted[0], name)[rows] for name in arrays} | {
        "splits": ["train"] * 100 + ["test"] * 100
    }
    twice["features"] = np.random.default_rng(0).random((200, 4))
    twice["pixels"][[0, 100]] = 7
    twice["pixels"][150:] = twice["pixels"][150:, :, ::-1]
    twice["probabilities"][::2] = np.nan
    found = audit_dataset(replace(planted[0], ids=[str(index) for index in range(200)], **twice))
    pairs = set(zip(found["duplicate"]["row"], found["duplicate"]["other_row"], strict=True))

    assert {(index, index + 100) for index in range(1, 100)} <= pairs
    assert (0, 100) not in pairs

    listed = found["label"]["row"]
    assert len(listed)
    assert (listed % 2 == 1).all()

    suggested = np.array(planted[0].names)[twice["probabilities"][listed].argmax(axis=1)]
    assert found["label"]["suggested"].tolist() == suggested.tolist()


def test_results_equal_cleanlab(
    planted: tuple[AuditedImages, ...], audit: dict[str, pd.DataFrame]
) -> None:
    """The score is the probability of the label.

    Outliers have the largest distance to their ten nearest neighbors.
    """
    from cleanlab.count import num_label_issues

    audited, flipped, _ = planted
    is_wrong = audited.probabilities.argmax(axis=1) != audited.labels
    assert audited.accuracy == 1 - is_wrong.mean()
    scores = audited.probabilities[np.arange(len(audited.labels)), audited.labels]
    number = num_label_issues(
        audited.labels, audited.probabilities, estimation_method="off_diagonal"
    )
    expected = np.argsort(scores, kind="stable")[:number]
    expected = expected[is_wrong[expected]]
    rows = audit["label"]
    names = np.array(audited.names)
    assert rows["row"].tolist() == expected.tolist()
    assert np.isin(flipped, expected).mean() > 0.75
    assert len(rows) < 80
    assert rows["score"].tolist() == pytest.approx(scores[expected].tolist(), abs=1e-4)
    assert (
        rows["suggested"].tolist() == names[audited.probabilities[expected].argmax(axis=1)].tolist()
    )
    assert rows["label"].tolist() == names[audited.labels[expected]].tolist()
    neighbors = NearestNeighbors(n_neighbors=11, metric="cosine").fit(audited.features)
    distances = neighbors.kneighbors(audited.features)[0][:, 1:].mean(axis=1)
    assert audit["outlier"]["row"].tolist() == np.argsort(-distances)[:18].tolist()  # 1 % of 1,817
    overlap = audit["overlap"]["Num Overlapping Examples"]
    assert len(overlap)
    assert overlap.min() > 0
    assert overlap.is_monotonic_decreasing
    assert set(audit["overlap"]["Class Name A"]) <= set(names)


def test_the_table_lists_all_issues_and_the_page_the_first_ones(
    planted: tuple[AuditedImages, ...],
    audit: dict[str, pd.DataFrame],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(audit_module, "MAX_SHOWN", 15)
    table = pd.read_csv(
        write_audit(audit, planted[0], tmp_path / "new" / "audit.html", "Digits"), dtype=str
    )
    listed = {issue: rows["id"].tolist() for issue, rows in table.groupby("issue")}

    assert listed == {
        issue: audit[issue]["id"].tolist() for issue in ("duplicate", "label", "outlier")
    }
    page = (tmp_path / "new" / "audit.html").read_text()
    assert page.count("<img") == 4 * 15
    assert "1,817 images" in page
    assert "--exclude audit.csv" in page
    assert [int(number) for number in re.findall(r"<h2>.*[(](.*)[)]</h2>", page)] == [
        len(rows) for rows in listed.values()
    ]
    assert page.index("different") < page.index("digit ")  # the error of the split is said first


# From the command to the training run -------------------------------------------------------------


def test_images_listed_by_an_audit_are_left_out_of_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """There are ten wrong labels, and five copies in another split, of 400 digits."""
    digits = load_digits()
    generator = np.random.default_rng(0)
    wrong = set(generator.choice(300, 10, replace=False).tolist())
    for index in range(400):
        split = "train" if index < 300 else "test"
        label = (digits.target[index] + (index in wrong) * 3) % 10
        file = tmp_path / "photos" / split / f"digit {label}" / f"{index}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.uint8(digits.images[index] * 15.9)).resize((32, 32)).save(file)
    for index in range(5):
        folder = tmp_path / "photos" / "test" / f"digit {digits.target[index]}"
        folder.mkdir(exist_ok=True)
        pixels = np.uint8(digits.images[index] * 15)
        Image.fromarray(np.fliplr(pixels) if index == 4 else pixels).resize((32, 32)).save(
            folder / f"copy {index}.png"
        )
    (tmp_path / "photos" / "train" / "digit 0" / "broken.png").write_bytes(b"broken")
    model = ViTCLSModel(build_tiny_config(image_size=32, patch_size=8, hidden_size=64))
    save_with_processor(model, tmp_path / "model")
    page = tmp_path / "audit [old]" / "page.html"

    output = tmp_path / "counts.json"
    counts = evaluate(
        tmp_path / "model", tmp_path / "photos", frozen="logreg", audit=page, output=output
    )
    assert json.loads(output.read_text()) == counts
    assert (counts["num_images"], counts["num_unreadable_images"]) == (405, 1)
    assert counts["across_splits"] >= 5

    table = pd.read_csv(page.with_suffix(".csv"), dtype=str)
    assert {issue: counts[issue] for issue in table["issue"]} == table[
        "issue"
    ].value_counts().to_dict()

    *_, warning, summary, accuracy, saved, _ = capsys.readouterr().out.splitlines()
    assert saved.split() == ["saved", *str(page).split(), "and", "page.csv"]
    kinds = ("num_images", "duplicate", "label", "outlier", "overlap")
    assert re.findall(r"\d+", f"{warning} {summary}") == [
        str(counts[kind]) for kind in ("across_splits", *kinds)
    ]
    assert "of photos</h1>" in page.read_text()
    assert f"{counts['accuracy']:.1%}" in accuracy
    assert f"{counts['accuracy']:.1%}" in page.read_text()

    pairs = {
        (Path(row["id"]).stem, Path(row["other"]).stem)
        for _, row in table.dropna(subset="other").iterrows()
    }
    assert {(str(index), f"copy {index}") for index in range(5)} <= pairs | {
        pair[::-1] for pair in pairs
    }

    listed = set(table["id"][(table["split"] == "train") & (table["issue"] == "label")])
    found = {index for index in wrong if any(Path(name).stem == str(index) for name in listed)}
    assert len(found) >= 5

    without = load_training_data(
        DataOptions(dataset=str(tmp_path / "photos"), exclude=page.with_suffix(".csv"))
    )
    excluded = set(table["id"][table["split"] == "train"])
    assert len(without.excluded) == len(excluded) == 301 - len(without.train)
    assert not excluded & set(without.train.images.get_names())
    assert len(without.held_out) == 105


def build_audit_options(folder: Path, photos: Path) -> EvaluateOptions:
    """Save an encoder, and return the options of an audit by logistic regression."""
    save_with_processor(ViTCLSModel(build_tiny_config()), folder / "model")
    return EvaluateOptions(
        model=str(folder / "model"),
        dataset=str(photos),
        num_workers=0,
        frozen="logreg",
        audit=folder / "page.html",
    )


def test_the_only_image_of_a_class_is_not_checked(tmp_path: Path) -> None:
    photos = write_photos(tmp_path / "photos", range(8))
    write_photos(photos, range(1), "bird")
    options = build_audit_options(tmp_path, photos)

    found, _, _ = load_audited_images(options)
    names = [found.names[label] for label in found.labels[found.is_checked]]
    assert names == ["cat"] * 8 + ["dog"] * 8
    assert audit_checkpoint(options)["num_images"] == 17


def test_photos_on_the_page_are_large_enough_to_judge_their_labels(tmp_path: Path) -> None:
    photos = write_photos(tmp_path / "photos", range(8))
    pixels = np.random.default_rng(0).integers(256, size=(300, 600, 3), dtype=np.uint8)
    for name in ("large", "copy"):
        Image.fromarray(pixels).save(photos / "cat" / f"{name}.png")
    options = build_audit_options(tmp_path, photos)

    audit_checkpoint(options)

    shown = re.findall(r'src="data:image/\w+;base64,([^"]+)"', options.audit.read_text())
    sizes = {Image.open(io.BytesIO(base64.b64decode(url))).size for url in shown}
    assert (192, 96) in sizes


def test_logistic_regression_needs_two_classes_of_two_images(tmp_path: Path) -> None:
    photos = write_photos(tmp_path / "photos", range(8), "cat")
    write_photos(photos, range(1), "bird")
    options = build_audit_options(tmp_path, photos)
    with raises_one_line("two images", "`frozen='knn'`"):
        audit_checkpoint(options)
    assert not options.audit.exists()


def test_an_audit_without_a_checked_label_has_no_accuracy(
    planted: tuple[AuditedImages, ...],
) -> None:
    audited = planted[0]
    unchecked = replace(audited, probabilities=np.full_like(audited.probabilities, np.nan))
    assert unchecked.accuracy is None


def test_audit_needs_a_classifier_or_frozen_features(tmp_path: Path) -> None:
    save_with_processor(ViTCLSModel(build_tiny_config()), tmp_path / "model")
    options = EvaluateOptions(
        model=str(tmp_path / "model"), dataset="digits", audit=tmp_path / "page.html"
    )
    with pytest.raises(ValueError, match="classifier"):
        audit_checkpoint(options)


def test_probabilities_are_of_models_that_were_not_trained_on_the_image(tmp_path: Path) -> None:
    """The source of the probabilities depends on what the model was trained on.

    They are the model's for the held-out split and, for a run with folds, the recorded ones of both
    splits. With `frozen`, they are out-of-fold. Labels are those of the model, whose classes have
    another order than the folders.
    """
    generator = np.random.default_rng(0)
    for split, name in (("train", "ant"), ("train", "bee"), ("val", "ant"), ("val", "bee")):
        (tmp_path / "photos" / split / name).mkdir(parents=True)
        for index in range(3):
            pixels = generator.integers(256, size=(32, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photos" / split / name / f"{index}.png")
    (tmp_path / "photos" / "train" / "ant" / "broken.png").write_bytes(b"broken")
    config = build_tiny_config(
        id2label={0: "bee", 1: "ant"}, num_labels=2, num_cls_tokens=2, num_register_tokens=1
    )
    folder = save_with_processor(ViTCLSForImageClassification(config), tmp_path / "run" / "fold-1")
    data = DataOptions(dataset=str(tmp_path / "photos"), num_workers=0)
    write_splits(load_training_data(data).build_splits_table(), folder)
    options = EvaluateOptions(model=str(folder), **vars(data), batch_size=4, fit="pad")

    found, num_unreadable, _ = load_audited_images(options)
    assert (found.splits, found.names, num_unreadable) == (
        ["train"] * 6 + ["validation"] * 6,
        ["bee", "ant"],
        1,
    )
    assert found.labels.tolist() == [1, 1, 1, 0, 0, 0] * 2

    images = [Image.open(tmp_path / "photos" / name) for name in found.ids]
    areas = [np.asarray(image.resize((32, 32), Image.Resampling.BOX)) for image in images]
    assert np.array_equal(found.pixels, np.stack(areas))

    model = ViTCLSForImageClassification.from_pretrained(folder).eval()
    processor = ViTCLSImageProcessor.from_pretrained(folder)
    set_fit(processor, "pad", (32, 32))
    pixel_values = processor(images, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        tokens = model.vitcls(pixel_values).tokens
        expected = model(pixel_values).logits.softmax(dim=1).numpy()

    features = torch.cat([tokens["cls"].flatten(1), tokens["patches"].mean(dim=1)], dim=1).numpy()
    assert found.features == pytest.approx(features, abs=1e-5)
    assert np.isnan(found.probabilities[:6]).all()
    assert found.probabilities[6:] == pytest.approx(expected[6:], abs=1e-5)

    frozen, _, _ = load_audited_images(replace(options, frozen="knn", split="validation"))
    assert len(audit_dataset(frozen)["outlier"]) == 1  # of 12 images
    knn = KNeighborsClassifier(9, weights="distance", metric="cosine")  # four fifths of the images
    expected = cross_val_predict(knn, features, frozen.labels, cv=5, method="predict_proba")
    assert frozen.probabilities == pytest.approx(expected, abs=1e-4)
    assert (frozen.names, frozen.labels.tolist()) == (["ant", "bee"], [0, 0, 0, 1, 1, 1] * 2)

    recorded = generator.random((12, 2))
    for fold, rows in (
        ("fold-1", slice(8, None)),
        ("fold-2", slice(1, 8)),
    ):  # the first image has no prediction
        (tmp_path / "run" / fold).mkdir(exist_ok=True)
        columns = {"image": found.ids[rows], "probabilities": list(recorded[rows])}
        pd.DataFrame(columns).to_parquet(tmp_path / "run" / fold / "predictions.parquet")
    by_fold, _, _ = load_audited_images(
        replace(options, model=str(tmp_path / "run"), split="validation")
    )
    assert (by_fold.ids, by_fold.splits, by_fold.names) == (found.ids, found.splits, found.names)
    assert np.array_equal(by_fold.features, found.features)
    assert np.array_equal(by_fold.labels, found.labels)
    assert np.isnan(by_fold.probabilities[0]).all()
    assert np.array_equal(by_fold.probabilities[1:], recorded[1:])
