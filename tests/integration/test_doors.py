"""The same photo has the same answer by every door, and a door refuses what `predict` refuses."""

import base64
import json
import re
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import transformers
from fastapi.testclient import TestClient
from helpers.demo_page import open_page
from helpers.doc_pages import read_program
from helpers.fresh_processes import run_python
from helpers.odd_photos import REFUSED, encode_turned, write_odd_photos
from helpers.photo_folders import encode_image
from helpers.sample_photographs import photograph
from helpers.tiny_models import (
    CLS,
    build_random,
    build_tiny_config,
    raises_one_line,
    save_with_processor,
)
from PIL import Image
from pytest import MonkeyPatch, approx
from scipy.special import softmax

from modeling_vitcls import (
    Predictor,
    ViTCLSForImageClassification,
    ViTCLSImageProcessor,
    add_class,
    evaluate,
    predict,
)
from modeling_vitcls.exporting.exporter import export_model
from modeling_vitcls.exporting.options import ExportOptions
from modeling_vitcls.frozen.class_statistics import ClassStatistics
from modeling_vitcls.hub.model_files import hash_weights


Photos = dict[str, Path]  # By name
Rows = dict[str, dict[str, Any]]  # Of `predict`, by name of the photo
NAMES = ("ant", "bee", "wasp")
TOP_K = 4  # All labels
TOLERANCE = 1e-5
PILLOW_TOLERANCE = 0.001
# Answers of the pipeline of transformers in a process that cannot import the package
CHILD = """
import json, sys
sys.modules["modeling_vitcls"] = None
import transformers
classify = transformers.pipeline("image-classification", sys.argv[1], trust_remote_code=True)
found = {}
for name, path in json.loads(sys.argv[2]).items():
    try:
        found[name] = {each["label"]: each["score"] for each in classify(path)}
    except ValueError as error:
        found[name] = str(error)
print("ANSWERS" + json.dumps(found))
"""

Answer = dict[str, float] | str  # Label -> probability, or why there is none


@pytest.fixture(scope="module")
def photos(module_path: Path) -> Photos:
    return write_odd_photos(module_path / "odd")


@pytest.fixture(
    scope="module", params=["trained", pytest.param("extended", marks=pytest.mark.slow)]
)
def model(
    request: pytest.FixtureRequest,
    photos: Photos,
    module_path: Path,
) -> Path:
    """Return a folder of a classifier that tells distances and unknown photos.

    The extended one has learned a further class from some of the photos (`add-class`).
    """
    trained = save_trained_model(module_path / "trained")
    if request.param == "trained":
        return trained
    added = [(str(file), "moth") for name, file in photos.items() if name.startswith("exif")]
    add_class(trained, added, module_path / "extended")
    return module_path / "extended"


def save_trained_model(folder: Path) -> Path:
    classifier = build_random(ViTCLSForImageClassification, id2label=dict(enumerate(NAMES)))
    features = {
        token: np.random.normal(size=(39, classifier.config.hidden_size))
        for token in (CLS, (-2, "mean"))
    }
    statistics = ClassStatistics.fit(features, np.arange(39) % len(NAMES), len(NAMES))
    statistics.set_in_model(classifier)
    classifier.config.distance_threshold = 100.0
    return save_with_processor(classifier, folder)


@pytest.fixture(scope="module")
def graph(model: Path) -> Path:
    """Return the file of `vitcls export` in the folder, which keeps its other files."""
    before = (model / "preprocessor_config.json").read_bytes()
    export_model(ExportOptions(model=str(model), output=model))
    assert (model / "preprocessor_config.json").read_bytes() == before
    return model / "model.onnx"


@pytest.fixture(scope="module")
def rows(model: Path, photos: Photos) -> Rows:
    """Return the rows of `predict` in float32, by name of the photo."""
    found = predict(model, list(photos.values()), top_k=TOP_K, mixed_precision="no")
    return dict(zip(photos, found, strict=True))


def read_answer(row: dict[str, Any]) -> Answer:
    if row["error"]:
        return str(row["error"])
    endings = ["", *(f"_{rank}" for rank in range(2, TOP_K + 1))]
    labels = {row.get(f"label{end}"): row.get(f"probability{end}") for end in endings}
    return {label: probability for label, probability in labels.items() if label is not None}


def check_answers(found: dict[str, Answer], rows: Rows) -> None:
    """Check the answers of a door for all photos."""
    assert {name for name, answer in found.items() if isinstance(answer, str)} == set(REFUSED)
    for name, row in rows.items():
        expected = read_answer(row)
        answer = found[name]
        if isinstance(answer, dict):
            assert answer == approx(expected, abs=TOLERANCE), name
        else:
            assert answer, name
            assert "\n" not in answer, name


def ask_one_by_one(classify: Any, photos: Photos) -> dict[str, Answer]:
    found: dict[str, Answer] = {}
    for name, file in photos.items():
        try:
            found[name] = {each["label"]: each["score"] for each in classify(str(file))}
        except ValueError as error:
            found[name] = str(error)
    return found


def test_predict_answers_every_odd_photo_and_refuses_the_others(rows: Rows) -> None:
    check_answers({name: read_answer(row) for name, row in rows.items()}, rows)
    assert all(row["distance"] is not None for row in rows.values() if not row["error"])


def test_the_pipeline_beside_the_package_is_transformers_own(model: Path, photos: Photos) -> None:
    classify = transformers.pipeline("image-classification", str(model))
    assert type(classify) is transformers.ImageClassificationPipeline
    found = {row["label"]: row["score"] for row in classify(str(photos["plain.png"]), top_k=TOP_K)}
    expected = read_answer(
        predict(model, photos["plain.png"], top_k=TOP_K, mixed_precision="no")[0]
    )
    assert found == approx(expected, abs=TOLERANCE)


def test_the_handler_of_an_inference_endpoint(model: Path, photos: Photos, rows: Rows) -> None:
    """It receives and returns JSON, and needs no package."""
    source = read_program("handler.py")
    assert "vitcls" not in source
    program = {}
    exec(source, program)
    handler = program["EndpointHandler"](str(model))

    def classify(file: str) -> list[dict[str, Any]]:
        body = {"inputs": base64.b64encode(Path(file).read_bytes()).decode()}
        answer = json.loads(json.dumps(handler(body | {"parameters": {"top_k": TOP_K}})))
        assert isinstance(answer["unknown"], bool)
        return answer["labels"]

    check_answers(ask_one_by_one(classify, photos), rows)
    handler.model.config.distance_threshold = None  # As below 100 training photos
    assert "unknown" not in handler({"inputs": photos["plain.png"].read_bytes()})


def test_the_handler_refuses_several_labels_per_image(tmp_path: Path) -> None:
    program: dict[str, Any] = {}
    exec(read_program("handler.py"), program)
    several = build_tiny_config(problem_type="multi_label_classification")
    save_with_processor(ViTCLSForImageClassification(several), tmp_path)
    with raises_one_line("one label per image"):
        program["EndpointHandler"](str(tmp_path))


@pytest.mark.slow
def test_the_folder_alone(model: Path, photos: Photos, rows: Rows) -> None:
    """test_remote_code.py compares outputs and pixel values of folders alone to the bit."""
    paths = json.dumps({name: str(file) for name, file in photos.items()})
    done = run_python("-c", CHILD, model, paths)
    check_answers(json.loads(done.stdout.partition("ANSWERS")[2]), rows)


def test_the_onnx_file_with_the_image_processor(
    model: Path, graph: Path, photos: Photos, rows: Rows
) -> None:
    import onnxruntime

    processor = ViTCLSImageProcessor.from_pretrained(model)
    session = onnxruntime.InferenceSession(graph)
    about = session.get_modelmeta().custom_metadata_map
    labels = json.loads(about["labels"])["logits"]
    for name in photos.keys() - set(REFUSED):
        images = {"pixel_values": processor(photos[name], return_tensors="np")["pixel_values"]}
        logits, distance = session.run(["logits", "distance"], images)
        probabilities = softmax(logits[0]).tolist()
        assert dict(zip(labels, probabilities, strict=True)) == approx(
            read_answer(rows[name]), abs=TOLERANCE
        )
        assert distance[0] == approx(rows[name]["distance"], rel=1e-4)
        is_unknown = bool(distance[0] > json.loads(about["distance_threshold"]))
        assert is_unknown == rows[name]["unknown"]


@pytest.mark.usefixtures("graph")
def test_the_lines_without_torch(
    model: Path,
    photos: Photos,
    rows: Rows,
    monkeypatch: MonkeyPatch,
) -> None:
    """Pillow resizes by up to 2 of 255 gray levels differently than torchvision."""
    import onnxruntime

    monkeypatch.chdir(model)
    answers = read_program("answer.py")
    imported = set(re.findall(r"^(?:import|from) (\w+)", answers, re.MULTILINE))
    assert imported == {"io", "json", "numpy", "onnxruntime", "PIL"}
    program = {}
    exec(answers, program)
    found = program["predictor"]([file.read_bytes() for file in photos.values()])
    assert program["version"] == hash_weights(model)["model.safetensors"]
    monkeypatch.setattr(onnxruntime.ModelMetadata, "custom_metadata_map", {})
    with pytest.raises(SystemExit, match="of another program"):
        exec(answers, {})
    answered = {name: row for name, row in zip(photos, found, strict=True) if not row["error"]}
    assert photos.keys() - answered == {*REFUSED, "gray16.png", "gray16.tif"}
    for name, row in answered.items():
        expected = rows[name]
        assert row["distance"] == approx(expected["distance"], rel=PILLOW_TOLERANCE), name
        assert row["label"] == expected["label"], name
        assert row["probability"] == approx(expected["probability"], abs=PILLOW_TOLERANCE), name
    program["about"]["distance_threshold"] = None
    assert "unknown" not in program["answer"](photos["plain.png"].read_bytes())


def test_the_server(model: Path, photos: Photos, rows: Rows) -> None:
    program = {}
    source = read_program("serve.py").replace("runs/photos", str(model))
    exec(source, program)
    program["predictor"] = Predictor(model, top_k=TOP_K, mixed_precision="no")
    client = TestClient(program["app"])
    found: dict[str, Answer] = {}
    for name, file in photos.items():
        answer = client.post("/predict", files=[("photos", (name, file.read_bytes()))])
        assert answer.status_code == (400 if name in REFUSED else 200), name
        (row,) = answer.json()["detail" if name in REFUSED else "photos"]
        assert row["image"] == f"0: {name}"
        assert row["unknown"] == rows[name]["unknown"]
        found[name] = read_answer(row)
    check_answers(found, rows)


def read_evaluated(model: Path, file: Path) -> dict[str, Answer]:
    """Read the answers in a table of evaluated photos, by name of the photo."""
    labels = list(ViTCLSForImageClassification.from_pretrained(model).config.label2id)
    return {
        Path(row["image"]).name: dict(zip(labels, row["probabilities"], strict=True))
        for row in pq.read_table(file).to_pylist()
    }


def test_evaluation(model: Path, photos: Photos, rows: Rows) -> None:
    """The images that trained the model are left out."""
    labeled = [(str(photos[name]), row["label"]) for name, row in rows.items() if row["label"]]
    file = model.parent / "rows.parquet"
    results = evaluate(model, labeled, per_image=file, mixed_precision="no", num_workers=0)
    assert results["accuracy"] == 1
    answers = read_evaluated(model, file)
    assert len(answers) >= 15
    for name, answer in answers.items():
        assert answer == approx(read_answer(rows[name]), abs=TOLERANCE), name


def test_the_page_of_the_demo(model: Path, photos: Photos, rows: Rows) -> None:
    import gradio

    ask = open_page(model)
    for name in ("gray16.png", "alpha.png", "exif6.jpg"):
        expected = "none of these" if rows[name]["unknown"] else read_answer(rows[name])
        answer = ask(str(photos[name]))[0]
        assert answer == approx(expected, abs=TOLERANCE), name
    for name in ("float.tif", "truncated.jpg"):
        with pytest.raises(gradio.Error):
            ask(str(photos[name]))


# Orientation --------------------------------------------------------------------------------------

# What shows an image upright, by EXIF orientation (CIPA DC-008, 4.6.4): rows, columns, both axes
TURNS = {
    1: lambda stored: stored,
    2: lambda stored: stored[:, ::-1],
    3: lambda stored: stored[::-1, ::-1],
    4: lambda stored: stored[::-1],
    5: lambda stored: stored.swapaxes(0, 1),
    6: lambda stored: stored[::-1].swapaxes(0, 1),
    7: lambda stored: stored[::-1, ::-1].swapaxes(0, 1),
    8: lambda stored: stored[:, ::-1].swapaxes(0, 1),
}


def test_every_door_shows_a_turned_photo_upright(model: Path) -> None:
    """Whichever metadata state the orientation, and in whichever order they stand."""
    photo = photograph("flower.jpg").crop((200, 90, 264, 138))
    files: dict[str, bytes] = {}
    upright: list[np.ndarray] = []
    for file_format in ("JPEG", "PNG", "WEBP", "TIFF"):
        stored = np.asarray(Image.open(BytesIO(encode_image(photo, file_format))))
        for orientation, turn in TURNS.items():
            for number, file in enumerate(encode_turned(photo, file_format, orientation)):
                files[f"{number}_{orientation}.{file_format.lower()}"] = file
                upright.append(np.ascontiguousarray(turn(stored)))
    paths = {name: model.parent / name for name in files}
    for name, path in paths.items():
        path.write_bytes(files[name])

    predictor = Predictor(model, top_k=TOP_K, mixed_precision="no", num_workers=0)
    expected = [read_answer(row) for row in predictor(upright)]
    assert all(expected.count(answer) <= 4 for answer in expected)  # Turns have other answers
    found = {
        "predict": predict(model, list(paths.values()), top_k=TOP_K, mixed_precision="no"),
        "path": predictor(list(paths.values())),
        "bytes": predictor(list(files.values())),
        "image": predictor([Image.open(path) for path in paths.values()]),
    }
    answers = {door: [*map(read_answer, rows)] for door, rows in found.items()}
    classify = transformers.pipeline("image-classification", str(model))
    answers["pipeline"] = [*ask_one_by_one(classify, paths).values()]

    table = model.parent / "turned.parquet"
    labeled = [(str(path), NAMES[0]) for path in paths.values()]
    evaluate(model, labeled, per_image=table, mixed_precision="no", num_workers=0)
    evaluated = read_evaluated(model, table)
    answers["evaluate"] = [evaluated[name] for name in paths]
    for door, answers_of_door in answers.items():
        for name, answer, wanted in zip(paths, answers_of_door, expected, strict=True):
            assert answer == approx(wanted, abs=TOLERANCE), (door, name)


# A model to keep ----------------------------------------------------------------------------------


def test_threads_that_share_a_predictor_get_the_rows_of_predict(
    model: Path, photos: Photos, rows: Rows
) -> None:
    """Whatever other commands of the process, and the caller's defaults, are."""
    predictor = Predictor(model, top_k=TOP_K, mixed_precision="no", num_workers=0)
    contents = {name: file.read_bytes() for name, file in photos.items()}
    predict(model, list(photos.values())[:1], mixed_precision="bf16")
    torch.set_default_dtype(torch.float64)
    try:
        with ThreadPoolExecutor(8) as threads:
            found = list(threads.map(predictor, [[content] for content in contents.values()] * 2))
    finally:
        torch.set_default_dtype(torch.float32)
    names = [*photos, *photos]
    check_answers({name: read_answer(row) for name, (row,) in zip(names, found, strict=True)}, rows)
    for name, (row,) in zip(names, found, strict=True):
        assert row["unknown"] == rows[name]["unknown"], name
        expected = rows[name]["distance"] or np.nan
        assert (row["distance"] or np.nan) == approx(expected, rel=1e-4, nan_ok=True), name


def test_predictors_keep_their_precision(model: Path, photos: Photos) -> None:
    """accelerate has one precision per process, that of the last command."""
    plain = photos["plain.png"]
    expected = predict(model, plain, top_k=TOP_K, mixed_precision="bf16")
    predictor = Predictor(model, top_k=TOP_K, mixed_precision="bf16")
    exact = predict(model, plain, top_k=TOP_K, mixed_precision="no")
    assert predictor(plain) == expected
    answer = read_answer(predictor(plain)[0])
    assert answer != read_answer(exact[0])
