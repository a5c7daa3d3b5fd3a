"""The audit of a dataset: planted label errors and duplicates are found, and the results are cleanlab's."""

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from helpers.tiny_models import build_tiny_config, save_with_processor
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_predict

from modeling_vitcls import ViTCLSModel, evaluate
from modeling_vitcls.analysis.audit import (
    AuditedImages,
    audit_checkpoint,
    audit_dataset,
    make_thumbnail,
    read_fold_probabilities,
    write_audit,
)
from modeling_vitcls.data.splits import load_training_data
from modeling_vitcls.options import DataOptions, EvaluateOptions


pytest.importorskip("cleanlab", reason="cleanlab is in the extras `audit` and `test`")
NUM_FLIPPED, NUM_COPIES = 54, 20  # 3 % of the labels


@pytest.fixture(scope="module")
def planted() -> tuple[AuditedImages, np.ndarray, np.ndarray]:
    """Return digits with wrong labels and darker JPEG copies, and the indices of wrong labels and copied images."""
    digits = load_digits()
    generator = np.random.default_rng(0)
    images = [Image.fromarray(np.uint8(pixels * 15.9)) for pixels in digits.images]
    labels, num_images = digits.target.copy(), len(digits.images)
    flipped = generator.choice(num_images, NUM_FLIPPED, replace=False)
    labels[flipped] = (labels[flipped] + generator.integers(1, 10, NUM_FLIPPED)) % 10
    copied = generator.choice(num_images, NUM_COPIES, replace=False)
    for index in copied:
        buffer = io.BytesIO()
        images[index].resize((32, 32)).point(lambda value: int(0.85 * value)).save(buffer, "JPEG", quality=90)
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
        names=[f"digit {index}" for index in range(10)],
    )
    return audited, flipped, copied


def test_planted_duplicates_are_found_and_none_is_invented(planted: tuple[AuditedImages, ...]) -> None:
    audited, _, copied = planted
    rows = audit_dataset(audited)["duplicate"]
    across = rows[rows["split"] != rows["other_split"]]
    assert set(zip(across["row"], across["other_row"], strict=True)) == {
        (index, 1797 + number) for number, index in enumerate(copied)
    }
    assert len(rows) - len(across) <= 5  # of 1,797 digits of 8 x 8 pixels, some of which agree by chance
    assert (rows["split"] != rows["other_split"]).is_monotonic_decreasing  # errors of the split come first


def test_identical_images_are_found_if_every_image_has_a_copy(planted: tuple[AuditedImages, ...]) -> None:
    rows, arrays = np.tile(np.arange(100), 2), ("labels", "probabilities", "features", "pixels")
    twice = {name: getattr(planted[0], name)[rows] for name in arrays} | {"splits": ["train"] * 100 + ["test"] * 100}
    found = audit_dataset(replace(planted[0], ids=[str(index) for index in range(200)], **twice))["duplicate"]
    assert {(index, index + 100) for index in range(100)} <= set(zip(found["row"], found["other_row"], strict=True))


def test_wrong_labels_are_found(planted: tuple[AuditedImages, ...]) -> None:
    audited, flipped, _ = planted
    rows = audit_dataset(audited)["label"]
    assert np.isin(flipped, rows["row"]).mean() > 0.75 and len(rows) < 80
    assert (rows["suggested"] != rows["label"]).mean() > 0.9


def test_results_equal_cleanlab(planted: tuple[AuditedImages, ...]) -> None:
    from cleanlab import Datalab

    audited, _, _ = planted
    lab = Datalab({"label": audited.labels}, label_name="label", verbosity=0)
    lab.find_issues(pred_probs=audited.probabilities, issue_types={"label": {}})
    expected = np.flatnonzero(lab.get_issues("label")["is_label_issue"])
    assert sorted(audit_dataset(audited)["label"]["row"]) == expected.tolist()


def test_images_the_model_was_trained_on_have_no_label_score(planted: tuple[AuditedImages, ...]) -> None:
    audited, _, _ = planted
    probabilities = audited.probabilities.copy()
    probabilities[::2] = np.nan
    without = AuditedImages(**{**vars(audited), "probabilities": probabilities})
    rows = audit_dataset(without)["label"]["row"]
    assert len(rows) and (rows % 2 == 1).all()


def test_page_and_table(planted: tuple[AuditedImages, ...], tmp_path: Path) -> None:
    audited, _, _ = planted
    audit = audit_dataset(audited)
    table = pd.read_csv(write_audit(audit, audited, tmp_path / "audit.html", "Digits"), dtype=str)
    assert (table["issue"] == "label").sum() == len(audit["label"])
    page = (tmp_path / "audit.html").read_text()
    assert page.count("<img") == 2 * len(audit["duplicate"]) + len(audit["label"]) + len(audit["outlier"])
    assert page.index("different") < page.index("digit ")  # the error of the split is said first


# From the command to the training run --------------------------------------------------------------------------------


def test_audit_of_a_folder_and_training_without_the_listed_images(tmp_path: Path) -> None:
    """Ten wrong labels and five copies in another split of 400 digits: the listed training images are left out."""
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
    page = tmp_path / "audit" / "page.html"
    counts = evaluate(tmp_path / "model", tmp_path / "photos", frozen="logreg", audit=page)
    assert (counts["num_images"], counts["num_unreadable_images"]) == (405, 1) and counts["across_splits"] >= 5
    table = pd.read_csv(page.with_suffix(".csv"), dtype=str)
    pairs = {(Path(row["id"]).stem, Path(row["other"]).stem) for _, row in table.dropna(subset="other").iterrows()}
    assert {(str(index), f"copy {index}") for index in range(5)} <= pairs | {pair[::-1] for pair in pairs}
    listed = set(table["id"][(table["split"] == "train") & (table["issue"] == "label")])
    found = {index for index in wrong if any(Path(name).stem == str(index) for name in listed)}
    assert len(found) >= 5
    without = load_training_data(DataOptions(str(tmp_path / "photos"), exclude=page.with_suffix(".csv")))
    excluded = set(table["id"][table["split"] == "train"])
    assert without.num_excluded == len(excluded) == 301 - len(without.train)
    selecting = load_training_data(DataOptions(str(tmp_path / "photos"), exclude=page.with_suffix(".csv")), True)
    assert selecting.num_excluded == len(excluded) < 301 - len(selecting.train)
    assert not excluded & set(without.train.images.get_names())
    assert len(without.held_out) == 105


def test_audit_needs_a_classifier_or_frozen_features(tmp_path: Path) -> None:
    save_with_processor(ViTCLSModel(build_tiny_config()), tmp_path / "model")
    options = EvaluateOptions(str(tmp_path / "model"), DataOptions("digits"), audit=tmp_path / "page.html")
    with pytest.raises(ValueError, match="classifier"):
        audit_checkpoint(options)


def test_folds_give_probabilities_for_all_images(tmp_path: Path) -> None:
    ids = ["a.png", "b.png", "c.png"]
    for fold, rows in ((1, {"b.png": [0.9, 0.1]}), (2, {"a.png": [0.2, 0.8]})):
        file = tmp_path / f"{fold}.parquet"
        pd.DataFrame({"image": list(rows), "probabilities": list(rows.values())}).to_parquet(file)
    found = read_fold_probabilities([tmp_path / "1.parquet", tmp_path / "2.parquet"], ids, 2)
    assert found[:2].tolist() == [[0.2, 0.8], [0.9, 0.1]] and np.isnan(found[2]).all()
