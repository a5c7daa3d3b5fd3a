"""The same photo has the same answer by every door, and a door refuses what `predict` refuses."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from helpers.fresh_processes import run_python
from helpers.odd_photos import REFUSED, write_odd_photos
from helpers.tiny_models import build_tiny_config, randomize, save_with_processor

from modeling_vitcls import ViTCLSForImageClassification, ViTCLSImageProcessor, predict
from modeling_vitcls.inference.class_statistics import ClassStatistics


NAMES = ("ant", "bee", "wasp")
TOLERANCE = 1e-5
# Runs the pipeline of a folder in a process that cannot import the package.
CHILD = """
import json, sys
sys.path.insert(0, {helpers!r})
from load_without_package import PackageBlocker
sys.meta_path.insert(0, PackageBlocker())
import transformers
classify = transformers.pipeline("image-classification", {model!r}, trust_remote_code=True)
answers = {{}}
for name, path in json.loads(sys.argv[1]).items():
    try:
        answers[name] = {{each["label"]: each["score"] for each in classify(path)}}
    except ValueError as error:
        answers[name] = str(error)
print("ANSWERS" + json.dumps(answers))
"""

Answer = dict[str, float] | str  # Label -> probability, or why there is none


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_odd_photos(tmp_path_factory.mktemp("odd"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of a classifier that tells distances and unknown photos."""
    labels = dict(enumerate(NAMES))
    config = build_tiny_config(id2label=labels, label2id={name: i for i, name in labels.items()})
    classifier = randomize(ViTCLSForImageClassification(config))
    features = np.random.default_rng(0).normal(size=(39, config.hidden_size))
    statistics = ClassStatistics.fit(
        {(-1, "cls"): features}, np.arange(39) % len(NAMES), len(NAMES)
    )
    statistics.set_in_model(classifier)
    processor = ViTCLSImageProcessor(size={"height": 32, "width": 32})
    return save_with_processor(classifier, tmp_path_factory.mktemp("doors") / "model", processor)


@pytest.fixture(scope="module")
def rows(model: Path, photos: dict[str, Path]) -> dict[str, dict[str, Any]]:
    """Return the rows of `predict` in float32, by name of the photo."""
    found = predict(model, list(photos.values()), top_k=len(NAMES), mixed_precision="no")
    return dict(zip(photos, found, strict=True))


def read_answer(row: dict[str, Any]) -> Answer:
    if row["error"]:
        return str(row["error"])
    endings = ["", *(f"_{rank}" for rank in range(2, len(NAMES) + 1))]
    return {row[f"label{end}"]: row[f"probability{end}"] for end in endings}


def check_answers(found: dict[str, Answer], rows: dict[str, dict[str, Any]]) -> None:
    """Check the answers of a door for all photos."""
    assert {name for name, answer in found.items() if isinstance(answer, str)} == set(REFUSED)
    for name, row in rows.items():
        expected = read_answer(row)
        answer = found[name]
        if isinstance(answer, dict):
            assert answer == pytest.approx(expected, abs=TOLERANCE), name
        else:
            assert answer, name
            assert "\n" not in answer, name


def ask_one_by_one(classify: Any, photos: dict[str, Path]) -> dict[str, Answer]:
    found: dict[str, Answer] = {}
    for name, file in photos.items():
        try:
            found[name] = {each["label"]: each["score"] for each in classify(str(file))}
        except ValueError as error:
            found[name] = str(error)
    return found


def test_predict_answers_every_odd_photo_and_refuses_the_others(
    rows: dict[str, dict[str, Any]],
) -> None:
    check_answers({name: read_answer(row) for name, row in rows.items()}, rows)
    assert all(row["distance"] is not None for row in rows.values() if not row["error"])


def test_the_pipeline_with_the_package_needs_no_trust(
    model: Path, photos: dict[str, Path], rows: dict[str, dict[str, Any]]
) -> None:
    classify = transformers.pipeline("image-classification", str(model))
    check_answers(ask_one_by_one(classify, photos), rows)


def test_the_pipeline_of_the_folder_alone(
    model: Path, photos: dict[str, Path], rows: dict[str, dict[str, Any]]
) -> None:
    helpers = str(Path(sys.modules["helpers.odd_photos"].__file__ or "").parent)
    program = CHILD.format(helpers=helpers, model=str(model))
    done = run_python("-c", program, json.dumps({name: str(file) for name, file in photos.items()}))
    check_answers(json.loads(done.stdout.partition("ANSWERS")[2]), rows)
