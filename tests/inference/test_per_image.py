"""One row per evaluated image, compared with the model, and with two processes."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from helpers.digits_models import train_digits_model
from scipy.special import softmax
from sklearn.metrics import log_loss

from modeling_vitcls import ViTCLSForImageClassification, ViTCLSImageProcessor, evaluate


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a model that was trained on digits."""
    target = tmp_path_factory.mktemp("models") / "digits"
    names = {index: str(index) for index in range(10)}
    train_digits_model(epochs=4, id2label=names).save_pretrained(target)
    processor = ViTCLSImageProcessor(size=8, image_mean=[0.5], image_std=[0.5], do_convert_rgb=False)
    processor.save_pretrained(target)
    return target


def test_rows_equal_the_metrics_of_the_same_evaluation(folder: Path, tmp_path: Path) -> None:
    results = evaluate(folder, "digits", per_image=tmp_path / "rows.parquet")
    rows = pd.read_parquet(tmp_path / "rows.parquet")
    assert len(rows) == results["num_images"]
    assert (rows["label"] == rows["prediction"]).mean() == pytest.approx(results["accuracy"], abs=1e-6)
    assert rows["loss"].mean() == pytest.approx(results["loss"], abs=1e-5)
    probabilities = np.stack(rows["probabilities"])
    names = sorted(rows["label"].unique())
    assert log_loss(rows["label"], probabilities, labels=names) == pytest.approx(results["loss"], abs=1e-5)
    assert rows["image"].is_unique and rows["index"].tolist() == list(range(len(rows)))


def test_several_tasks_are_refused(tmp_path: Path) -> None:
    from modeling_vitcls.data.labels import LabelSpace
    from modeling_vitcls.inference.per_image import check_per_image

    with pytest.raises(ValueError, match="--per-image"):
        check_per_image(LabelSpace("multi_task", {"kind": ["a", "b"], "time": ["c", "d"]}))


def test_a_temperature_changes_probabilities_only(folder: Path, tmp_path: Path) -> None:
    model = ViTCLSForImageClassification.from_pretrained(folder)
    model.config.temperature = 2.0
    model.save_pretrained(tmp_path / "calibrated")
    ViTCLSImageProcessor.from_pretrained(folder).save_pretrained(tmp_path / "calibrated")
    tables = {}
    for name in (folder, tmp_path / "calibrated"):
        evaluate(name, "digits", per_image=tmp_path / "rows.parquet")
        tables[name] = pd.read_parquet(tmp_path / "rows.parquet")
    before, after = tables.values()
    assert (before["prediction"] == after["prediction"]).all()
    logits = np.log(np.stack(before["probabilities"]))
    assert np.stack(after["probabilities"]) == pytest.approx(softmax(logits / 2, axis=1), abs=1e-5)
