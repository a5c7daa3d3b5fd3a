"""The audit of a dataset: planted errors are found, and the checked photos are left out."""

import base64
import io
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from helpers.accelerate_state import reset_accelerate
from helpers.photo_folders import write_photos
from helpers.tiny_models import build_tiny_config, raises_one_line, save_with_processor
from PIL import Image
from playwright.sync_api import Browser
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_predict
from sklearn.neighbors import NearestNeighbors

from modeling_vitcls import ViTCLSModel, evaluate, finetune
from modeling_vitcls.analysis import audit as audit_module
from modeling_vitcls.analysis.audit import (
    AuditedImages,
    audit_checkpoint,
    audit_images,
    find_near_duplicates,
    load_audited_images,
    predict_out_of_fold,
    write_audit,
)
from modeling_vitcls.data.images import LabeledImages
from modeling_vitcls.inference.options import EvaluateOptions


pytest.importorskip("cleanlab", reason="cleanlab is in the extras `audit` and `test`")
pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("fresh_accelerate")]

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
        images[index].resize((32, 32)).point(lambda value: int(0.95 * value)).save(
            buffer, "JPEG", quality=90
        )
        images.append(Image.open(buffer).resize((8, 8), Image.Resampling.BOX))
    labels = np.concatenate([labels, labels[copied]])
    features = np.stack([np.asarray(image, float).reshape(-1) for image in images]) / 255
    rows = pd.DataFrame(
        {
            "split": ["train"] * num_images + ["test"] * NUM_COPIES,
            "id": [str(index) for index in range(len(images))],
            "label": [f"digit {label}" for label in labels],
        }
    )
    source = LabeledImages(images, labels.tolist())
    audited = AuditedImages(
        rows=rows,
        sources=[(source, index) for index in range(len(images))],
        keys=np.arange(len(images), dtype=np.uint64),
        features={(-1, "cls"): features},
        probabilities=np.zeros((len(images), 0)),
    )
    return replace(audited, probabilities=predict_out_of_fold(audited)), flipped, copied


@pytest.fixture(scope="module")
def audit(planted: tuple[AuditedImages, ...]) -> dict[str, pd.DataFrame]:
    return audit_images(planted[0])


def test_copies_in_another_split_come_first(
    planted: tuple[AuditedImages, ...], audit: dict[str, pd.DataFrame]
) -> None:
    _, _, copied = planted
    rows = audit["duplicate"]
    across = rows[rows["split"] != rows["other_split"]]

    assert set(zip(across["row"], across["other_row"], strict=True)) == {
        (index, 1797 + number) for number, index in enumerate(copied)
    }
    assert across["score"].is_monotonic_increasing
    assert (rows["split"] != rows["other_split"]).is_monotonic_decreasing
    # of 1,797 digits of 8 x 8 pixels, some of which agree by chance
    assert len(rows) - len(across) <= 5


def test_a_mirrored_copy_is_a_near_duplicate_and_plain_images_are_none(
    planted: tuple[AuditedImages, ...],
) -> None:
    generator = np.random.default_rng(0)
    images = [
        Image.fromarray(generator.integers(256, size=(60, 90, 3), dtype=np.uint8)) for _ in range(9)
    ]
    images += [images[3].transpose(Image.Transpose.FLIP_LEFT_RIGHT)]
    images += [Image.new("RGB", (60, 90), color) for color in ("white", "black")]
    source = LabeledImages(images, [0] * len(images))
    audited = replace(planted[0], sources=[(source, index) for index in range(len(images))])

    pairs, _ = find_near_duplicates(audited)

    assert pairs.tolist() == [[3, 9]]


def test_the_ranking_finds_as_many_wrong_labels_as_scikit_learn(
    planted: tuple[AuditedImages, ...], audit: dict[str, pd.DataFrame]
) -> None:
    audited, flipped, _ = planted
    names, labels = np.unique(audited.rows["label"], return_inverse=True)
    expected = cross_val_predict(
        LogisticRegression(max_iter=2000),
        audited.features[-1, "cls"],
        labels,
        cv=5,
        method="predict_proba",
    )
    ranked = np.argsort(expected[np.arange(len(labels)), labels], kind="stable")
    rows = audit["label"]

    for count in (20, 32):
        found = np.isin(rows["row"].head(count), flipped).sum()
        assert found >= np.isin(ranked[:count], flipped).sum()
    scores = audited.probabilities[rows["row"], labels[rows["row"]]]
    assert rows["score"].tolist() == pytest.approx(scores.tolist(), abs=1e-4)
    assert rows["score"].is_monotonic_increasing
    assert (rows["predicted"] == names[audited.probabilities[rows["row"]].argmax(axis=1)]).all()


def test_outliers_are_far_from_their_nearest_images(
    planted: tuple[AuditedImages, ...], audit: dict[str, pd.DataFrame]
) -> None:
    features = planted[0].features[-1, "cls"]
    neighbors = NearestNeighbors(n_neighbors=11, metric="cosine").fit(features)
    distances = neighbors.kneighbors(features)[0][:, 1:].mean(axis=1)
    rows = audit["outlier"]["row"]

    assert len(rows)
    assert rows.tolist() == np.argsort(-distances)[: len(rows)].tolist()


def test_the_only_image_of_a_class_is_not_checked(
    planted: tuple[AuditedImages, ...],
) -> None:
    audited = planted[0]
    rows = audited.rows.copy()
    rows.loc[0, "label"] = "other"
    changed = replace(audited, rows=rows)
    changed = replace(changed, probabilities=predict_out_of_fold(changed))

    assert np.flatnonzero(~changed.is_checked).tolist() == [0]
    assert 0 not in audit_images(changed)["label"]["row"].tolist()


def test_the_table_lists_all_issues_and_the_page_the_first_ones(
    planted: tuple[AuditedImages, ...],
    audit: dict[str, pd.DataFrame],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(audit_module, "MAX_SHOWN", 5)
    table = pd.read_csv(
        write_audit(audit, planted[0], tmp_path / "new" / "audit.html", "Digits"), dtype=str
    )
    listed = {issue: rows["id"].tolist() for issue, rows in table.groupby("issue")}
    page = (tmp_path / "new" / "audit.html").read_text()

    assert listed == {issue: rows["id"].tolist() for issue, rows in audit.items()}
    shown = {issue: min(len(rows), 5) for issue, rows in audit.items()}
    assert page.count("<img") == sum(shown.values()) + shown["duplicate"]  # pairs
    counts = dict(re.findall(r"<h2>(.*) [(](.*)[)]</h2>", page))
    assert [int(number) for number in counts.values()] == [
        len(audit[issue]) for issue in ("label", "duplicate", "outlier")
    ]


# From the command to the training run -------------------------------------------------------------


def test_checked_photos_are_left_out_of_training(browser: Browser, tmp_path: Path) -> None:
    """Twelve of 80 photos of two kinds of noise are in the wrong folder, and one is a copy."""
    photos = tmp_path / "photos"
    generator = np.random.default_rng(0)
    for index in range(80):
        is_dark = index % 2 == 0
        name = "=dark, old" if is_dark != (index < 12) else "light"
        pixels = generator.integers(0, 120, (60, 90, 3), dtype=np.uint8) + (0 if is_dark else 130)
        (photos / name).mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.uint8(pixels)).save(photos / name / f"{index}.png")
    (photos / "light" / "copy.png").write_bytes((photos / "light" / "31.png").read_bytes())
    (photos / "light" / "broken.png").write_bytes(b"broken")
    model = save_with_processor(ViTCLSModel(build_tiny_config()), tmp_path / "model")
    page, output = tmp_path / "audit.html", tmp_path / "counts.json"

    counts = evaluate(model, photos, audit=page, output=output, num_workers=0)

    assert json.loads(output.read_text()) == counts
    assert (counts["num_images"], counts["num_unreadable_images"]) == (81, 1)
    assert counts["label"] >= 8
    table = pd.read_csv(page.with_suffix(".csv"), dtype=str)
    assert table["issue"].value_counts().to_dict() == {
        issue: counts[issue] for issue in ("label", "duplicate", "outlier") if counts[issue]
    }

    context = browser.new_context(offline=True, accept_downloads=True)
    opened = context.new_page()
    opened.goto(page.as_uri())
    button = opened.get_by_role("button")
    assert button.is_disabled()
    chosen = [opened.locator("#label label").nth(number) for number in (0, 2)]
    for photo in chosen:
        photo.click()
    with opened.expect_download() as download:
        button.click()
    exclude = tmp_path / download.value.suggested_filename
    download.value.save_as(exclude)
    for width in (390, 1280):
        opened.set_viewport_size({"width": width, "height": 844})
        assert opened.evaluate("document.documentElement.scrollWidth") <= width
        tiles = opened.locator("#label .tiles").bounding_box()
        assert tiles is not None
        assert tiles["width"] >= min(width - 40, 1150)
    context.close()

    assert exclude.name == "exclude.csv"
    labels = table[table["issue"] == "label"]
    expected = labels.iloc[[0, 2]][["split", "id", "label"]]
    assert pd.read_csv(exclude, dtype=str).to_numpy().tolist() == expected.to_numpy().tolist()
    reset_accelerate()
    finetune(
        model,
        photos,
        output_dir=tmp_path / "run",
        exclude=exclude,
        trainable="head",
        num_workers=0,
        report=False,
    )
    seen = pd.read_parquet(tmp_path / "run" / "predictions.parquet")["image"]
    assert len(seen) == 79
    assert not seen.isin(expected["id"].str.removeprefix("'")).any()


def build_audit_options(folder: Path, photos: Path) -> EvaluateOptions:
    """Save an encoder, and return the options of an audit."""
    save_with_processor(ViTCLSModel(build_tiny_config()), folder / "model")
    return EvaluateOptions(
        model=str(folder / "model"), dataset=str(photos), num_workers=0, audit=folder / "page.html"
    )


def test_a_frozen_run_has_already_predicted_its_images(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Other photos with the same names are predicted anew."""
    photos = write_photos(tmp_path / "photos", range(10))
    other = write_photos(tmp_path / "other", range(20, 30))
    for path in other.glob("*/*.png"):
        path.rename(path.with_stem(str(int(path.stem) - 20)))
    options = build_audit_options(tmp_path, photos)
    finetune(
        options.model,
        photos,
        output_dir=tmp_path / "run",
        trainable="head",
        num_workers=0,
        report=False,
    )
    reset_accelerate()
    options = replace(options, model=str(tmp_path / "run"))
    recorded = pd.read_parquet(tmp_path / "run" / "predictions.parquet").set_index("image")
    capsys.readouterr()

    found, _, _ = load_audited_images(options)
    expected = np.stack(recorded.loc[found.rows["id"], "probabilities"])
    assert np.array_equal(found.probabilities, expected)
    assert "predictions of the run" in capsys.readouterr().out

    found, _, _ = load_audited_images(replace(options, dataset=str(other)))
    assert set(found.rows["id"]) == set(recorded.index)
    assert "predictions of the run" not in capsys.readouterr().out


def test_photos_on_the_page_are_large_enough_to_judge_their_labels(tmp_path: Path) -> None:
    photos = write_photos(tmp_path / "photos", range(8))
    pixels = np.random.default_rng(0).integers(256, size=(300, 600, 3), dtype=np.uint8)
    for name in ("large", "copy"):
        Image.fromarray(pixels).save(photos / "cat" / f"{name}.png")
    options = build_audit_options(tmp_path, photos)
    assert options.audit is not None

    audit_checkpoint(options)

    shown = re.findall(r'src="data:image/\w+;base64,([^"]+)"', options.audit.read_text())
    sizes = {Image.open(io.BytesIO(base64.b64decode(url))).size for url in shown}
    assert (192, 96) in sizes


def test_an_audit_needs_two_classes_of_two_images(tmp_path: Path) -> None:
    photos = write_photos(tmp_path / "photos", range(8), "cat")
    write_photos(photos, range(1), "bird")
    options = build_audit_options(tmp_path, photos)
    assert options.audit is not None
    with raises_one_line("two different images of each of two classes"):
        audit_checkpoint(options)
    assert not options.audit.exists()
