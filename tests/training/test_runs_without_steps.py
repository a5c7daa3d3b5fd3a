"""Runs that keep the encoder, and what they say.

The encoder is converted and has a native side of 280 pixels; the photos are not square, and the
classes have different sizes.
"""

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from helpers.accelerate_state import reset_accelerate
from helpers.command_in_process import finetune
from helpers.photo_folders import (
    write_bursts,
    write_files,
    write_photos,
    write_shots,
    write_unequal_photos,
)
from helpers.sample_photographs import photograph
from helpers.tiny_models import raises_one_line
from numpy.random import default_rng
from PIL import Image
from pytest import CaptureFixture, MonkeyPatch, approx

import modeling_vitcls
from modeling_vitcls import ViTCLSModel, add_class, evaluate, predict
from modeling_vitcls.data.images import DatasetImages
from modeling_vitcls.hub.model_folder import ModelFolder
from modeling_vitcls.inference.intervals import compute_proportion_interval
from modeling_vitcls.publishing.report import write_report
from modeling_vitcls.runtime.files import read_json
from modeling_vitcls.training import frozen_run


@pytest.fixture(autouse=True)
def sources(converted_encoder: Path, tmp_path: Path, monkeypatch: MonkeyPatch) -> None:
    """Work in a folder with a Dinov2 encoder, `vit`, and `my photos` of two classes."""
    (tmp_path / "vit").symlink_to(converted_encoder)
    write_unequal_photos(tmp_path / "my photos")
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def frozen(converted_encoder: Path, module_path: Path) -> dict[str, Any]:
    """Return what a frozen run on `my photos` says."""
    photos = write_unequal_photos(module_path / "my photos")
    return finetune(converted_encoder, photos, module_path / "frozen")


@pytest.fixture(scope="module")
def tuned(converted_encoder: Path, frozen: dict[str, Any], module_path: Path) -> dict[str, Any]:
    """Return what a run with three steps on these photos says."""
    flags = ("--epochs", "1", "--batch-size", "8", "--log-with", "tensorboard")
    return finetune(converted_encoder, module_path / "my photos", module_path / "tuned", *flags)


@pytest.fixture(scope="module")
def of_bursts(converted_encoder: Path, module_path: Path) -> dict[str, Any]:
    """Return what a frozen run says about shots of sixteen objects and a vase.

    The labels of the objects mean nothing. The vase is a class of one scene.
    """
    photos = module_path / "bursts"
    write_bursts(photos)
    write_shots(photos / "vase", scene=40)
    (photos / "cups/IMG_04.png").rename(photos / "pens/WhatsApp.png")
    return finetune(converted_encoder, photos, module_path / "of bursts")


def list_photos(folder: str = "my photos") -> list[Path]:
    """List the photos of a folder in the order of their paths."""
    return sorted(Path(folder).rglob("*.png"))


def write_rows(file: str, header: str, rows: list[str]) -> None:
    """Write a table."""
    Path(file).write_text("\n".join([header, *rows]))


def test_a_tracker_begins_with_the_frozen_model(tuned: Any) -> None:
    event_files = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    folder = tuned["folder"] / "trackers/tuned"
    events = event_files.EventAccumulator(str(folder)).Reload()
    first, *_ = events.Scalars("held_out_accuracy")
    assert first.step == 0
    assert first.value == approx(tuned["before_steps"]["accuracy"])


def test_a_run_without_steps_says_how_to_train_all_layers(frozen: Any, tuned: Any) -> None:
    """Unless the person has asked for a frozen encoder."""
    head = finetune("vit", "my photos", "head", "--trainable", "head")
    for results in (frozen, head):
        assert results["steps"] == 0
        advice = "set --epochs 5 and another --output-dir"
        assert (advice in results["printed"]) is (results is frozen)

    assert tuned["steps"] == 3
    start = tuned["before_steps"]["accuracy"]
    printed = tuned["printed"]
    num_images = tuned["num_images"]
    num_right = round(start * num_images)
    assert f". Before the steps: {num_right} of {num_images} right" in printed
    assert ("which was better" in printed) is (start > tuned["accuracy"])
    original, trained = (
        ViTCLSModel.from_pretrained(results["folder"]).state_dict() for results in (frozen, tuned)
    )
    names = [f"layers.{index}.mlp.fc1.weight" for index in range(5)]
    assert not any(torch.equal(original[name], trained[name]) for name in names)


def test_a_run_that_continues_a_model_is_compared_with_this_model_itself(
    frozen: Any, tuned: Any
) -> None:
    """On the held-out photos of both runs; photos that trained the model compare nothing."""
    again = finetune(tuned["folder"], "my photos", "again", "--epochs", "1")
    assert again["initial_classifier"] == {"accuracy": tuned["accuracy"]}
    assert f"{tuned['folder']} itself: " in again["printed"]

    flags = ("--epochs", "1", "--held-out-fraction", "0.2")
    known = finetune(frozen["folder"], "my photos", "known", *flags)
    assert known["initial_classifier"] is None


def test_a_run_below_chance_counts_the_predictions_that_it_writes() -> None:
    write_photos(Path("noise"), range(75, 90))
    results = finetune("vit", "noise", "run")
    rows = pd.read_parquet("run/predictions.parquet")
    num_right = (rows["label"] == rows["prediction"]).sum()
    assert results["num_right"] == num_right == np.trace(results["confusion_matrix"])
    assert (
        f"{num_right} of 30 right; about {results['accuracy']:.0%} of new photos"
        in results["printed"]
    )
    assert num_right / 30 == approx(results["accuracy"], abs=0.02)


@pytest.mark.parametrize("flags", [(), ("--epochs", "1", "--no-probe")])
def test_a_class_without_readable_images_is_named_and_never_predicted(
    flags: tuple[str, ...],
) -> None:
    """The saved model has the class, in a run with steps as in a frozen one."""
    names = [f"zebra/{index}.png" for index in range(3)]
    write_files(Path("my photos"), *names, content=b"no photo")
    results = finetune("vit", "my photos", "run", *flags)
    assert "no image of zebra can be read" in results["printed"]
    assert len(read_json(Path("run/config.json"))["id2label"]) == 3
    rows = predict("run", "my photos/ants", top_k=3)
    assert all(row["label_3"] == "zebra" for row in rows)
    assert max(row["probability_3"] for row in rows) < 1e-12


def test_a_damaged_photo_is_counted_whatever_task_is_last_and_two_tasks_get_a_report() -> None:
    """No fold can measure the last task, which has one image of each class."""
    write_files(Path("my photos"), "ants/damaged.png", content=b"no photo")
    photos = list_photos()
    places = {photos[0]: "garden", photos[-1]: "wood"}
    rows = [f"{photo},{photo.parent.name},{places.get(photo, '')}" for photo in photos]
    write_rows("tasks.csv", "image,insect,place", rows)
    results = finetune("vit", "tasks.csv", "run", "--label-column", "insect", "place")
    assert results["tasks"]["insect"]["num_unreadable_images"] == 1
    assert results["num_unreadable_images"] == results["num_unreadable_training_images"] == 1
    assert results["num_images"] == 24
    assert "1 of 25 training images could not be read" in results["printed"]
    write_report(ModelFolder(Path("run")))
    assert Path("run/report.html").exists()


def test_a_damaged_held_out_photo_measures_no_task() -> None:
    write_files(Path("my photos"), "ants/damaged.png", content=b"no photo")
    rows = []
    for index, photo in enumerate(list_photos()):
        split = "test" if index % 2 or photo.stem == "damaged" else "train"
        rows.append(f"{photo},{photo.parent.name},{('few', 'many')[index % 3 > 0]},{split}")
    write_rows("tasks.csv", "image,insect,legs,split", rows)
    results = finetune("vit", "tasks.csv", "run", "--label-column", "insect", "legs")
    assert results["split"] == "split 'test'"
    assert results["num_unreadable_images"] == 1
    assert results["num_images"] == results["tasks"]["legs"]["num_images"]
    assert results["num_images"] == sum(row.endswith("test") for row in rows) - 1


@pytest.mark.filterwarnings("error::scipy.linalg.LinAlgWarning")
@pytest.mark.parametrize("num_photos", [1, 2, 3, 4])
def test_a_few_photos_of_each_class_are_enough_and_have_no_percentage(num_photos: int) -> None:
    """Two images have one difference, and four classes of them a covariance of rank 4."""
    photos = list_photos("my photos/ants")[: 4 * num_photos]
    write_files(Path("few photos"), "kind 0/broken.png")  # does not count
    for index, photo in enumerate(photos):
        folder = Path("few photos") / f"kind {index % 4}"
        folder.mkdir(exist_ok=True)
        photo.rename(folder / photo.name)

    results = finetune("vit", "few photos", "frozen")
    assert results["steps"] == 0
    assert results["num_training_images"] == len(photos)
    assert ("right (95%" in results["printed"]) == (num_photos > 1)


@pytest.mark.slow
@pytest.mark.filterwarnings("error:The number of unique classes")
def test_a_second_photo_makes_no_class_harder_to_find_and_only_pairs_are_measured() -> None:
    """Ten classes with one photo and ten with two, which are parts of one large photo."""
    generator = default_rng(0)
    for number in range(20):
        pixels = generator.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        photo = Image.fromarray(pixels).resize((320, 320), Image.Resampling.BICUBIC)
        for shot in range(4):
            folder = "few" if shot <= number % 2 else "others" if shot > 1 else "unused"
            path = Path(folder) / f"kind {number}" / f"{shot}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            photo.crop((8 * shot, 4 * shot, 280 + 8 * shot, 280 + 4 * shot)).save(path)

    results = finetune("vit", "few", "frozen")
    assert results["num_images"] == 20
    assert "fitted to 30 images, of which 10 are not counted" in results["printed"]
    recalls = [row["recall"] for row in evaluate("frozen", "others", num_workers=0)["per_class"]]
    with_one, with_two = np.reshape(recalls, (10, 2)).mean(axis=0)
    assert with_two > with_one - 0.1
    assert with_one > 0.7


def test_a_class_with_one_photo_causes_no_warning_of_scikit_learn() -> None:
    Path("my photos/wasps").mkdir()
    list_photos("my photos/ants")[0].rename("my photos/wasps/1.png")
    printed = finetune("vit", "my photos", "run")["printed"]
    assert "--class-balance weights gives all classes the same weight" in printed


def test_a_line_says_that_no_step_trains_new_registers() -> None:
    printed = finetune("vit", "my photos", "run", "--num-register-tokens", "2")["printed"]
    assert "no steps  --num-register-tokens: no effect" in printed


def test_a_recipe_other_file_names_and_flags_of_steps_change_no_result(frozen: Any) -> None:
    """A line names the flags that only steps read."""
    for index, photo in enumerate(list_photos()[::-1]):
        folder = Path("renamed", photo.parent.name)
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(photo, folder / f"{index:02}.png")
    recipe = str(frozen["folder"] / "config.resolved.yaml")
    flags = ["--mixup", "0.8", "--augment", "cutmix=1", "--log-with", "tensorboard"]
    again = finetune("vit", "renamed", "again", "--config", recipe, *flags)
    assert again["steps"] == 0
    assert again["confusion_matrix"] == frozen["confusion_matrix"]
    assert again["frozen"]["candidates"] == frozen["frozen"]["candidates"]
    (line,) = (line for line in again["printed"].splitlines() if line.startswith("no steps"))
    assert {"--mixup", "--augment", "--log-with"} <= {
        *line.replace(",", " ").replace(":", "").split()
    }


def test_a_run_with_steps_says_why_none_will_be_unknown(tuned: Any) -> None:
    assert tuned["num_images"] < 100
    assert "not be marked: this requires 100 held-out images" in tuned["printed"]
    assert read_json(tuned["folder"] / "config.json").get("distance_threshold") is None


def test_images_that_trained_the_encoder_measure_nothing(frozen: Any, tuned: Any) -> None:
    """It knows their labels, also under new names and after another run. A frozen one does not."""

    def has_interval(results: Any) -> bool:
        """Check that a warning and the card say why there is no interval."""
        has_interval = "accuracy_interval" in results
        card = (results["folder"] / "README.md").read_text()
        assert ("images that measure this run" in results["printed"]) is not has_interval
        assert ("or its teacher was trained on" in card) is not has_interval
        return has_interval

    assert has_interval(frozen)
    assert has_interval(tuned)
    Path("my photos/ants").rename("my photos/insects")
    assert has_interval(finetune(frozen["folder"], "my photos", "frozen-again"))
    steps = tuned["folder"]
    assert not has_interval(finetune(steps, "my photos", "second"))
    flags = ("--held-out-fraction", "0.4")
    assert not has_interval(finetune(steps, "my photos", "held-out", *flags))
    assert not has_interval(finetune("second", "my photos", "third"))


def test_shots_of_one_object_do_not_measure_each_other(of_bursts: Any) -> None:
    """Objects whose labels mean nothing: they are recognized, and nothing else is."""
    assert not of_bursts.keys() & {"images_per_second", "steps_train_encoder"}
    assert of_bursts["accuracy_interval"][0] < 0.5
    assert of_bursts["accuracy"] < 0.75
    printed = of_bursts["printed"]
    assert "80 of 85 photos are shots of " in printed
    first, second = of_bursts["frozen"]["scenes"]["pairs"][0]
    assert {Path(first).parent.name, Path(second).parent.name} == {"cups", "pens"}
    assert "pens/WhatsApp.png" in (first, second)
    assert f"have two labels, such as {first} and {second}" in printed


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param("--max-steps 2 --save-every 1 --keep-checkpoints 2", marks=pytest.mark.slow),
        "--trainable head --held-out-fraction 0.2",
    ],
)
def test_shots_of_one_object_are_on_one_side_of_the_held_out_photos(flags: str) -> None:
    write_bursts(Path("bursts"), shots=range(3))
    results = finetune("vit", "bursts", "run", *flags.split())
    held_out = pd.read_parquet("run/predictions.parquet")["image"]
    objects = held_out.str.extract(r"IMG_(\d+)\d.png")[0]
    assert set(objects.value_counts()) == {3}
    assert objects.nunique() in (3, 4)  # A fifth are 10 of 48 photos
    photos = list_photos("bursts")
    keys = DatasetImages.from_list(list(map(str, photos))).compute_content_keys()
    splits = pd.read_parquet("run/splits.parquet").set_index("key")["split"][keys]
    assert (splits == "test").sum() == len(held_out)
    assert set(splits.groupby([photo.stem[:-1] for photo in photos]).nunique()) == {1}
    printed = results["printed"]
    num_trained = (splits == "train").sum()
    assert results["num_training_images"] == num_trained
    assert f": {len(photos)} images\n" in printed
    assert f"divided   {num_trained} training images, " in printed
    if results["steps"]:
        Path("run/results.json").unlink()
        finetune("vit", "bursts", "run", *flags.split(), "--resume")
        resumed = pd.read_parquet("run/predictions.parquet")
        assert resumed["image"].tolist() == held_out.tolist()


def test_photos_beyond_the_limit_of_a_start_are_not_compared_and_a_line_says_how_many(
    monkeypatch: MonkeyPatch,
) -> None:
    monkeypatch.setattr(frozen_run, "MAX_START_IMAGES", 20)
    flags = ("--max-steps", "1", "--held-out-fraction", "0.25")
    results = finetune("vit", "my photos", "run", *flags)
    assert "4 images were not compared with the others" in results["printed"]
    assert results["num_images"] + results["num_training_images"] == 24
    assert "before_steps" in results


def test_a_class_that_is_one_scene_is_measured_and_the_line_says_by_what(
    of_bursts: Any,
) -> None:
    assert of_bursts["frozen"]["scenes"]["divided_classes"] == ["vase"]
    counts = {row["name"]: row["images"] for row in of_bursts["per_class"]}
    assert counts == {"cups": 39, "pens": 41, "vase": 5}
    assert "all photos of vase are shots of one scene" in of_bursts["printed"]


@pytest.mark.parametrize("flags", [(), ("--max-steps", "1")], ids=["frozen", "steps"])
def test_photos_of_a_test_folder_that_repeat_training_photos_are_named_and_the_others_measured(
    flags: tuple[str, ...],
) -> None:
    write_bursts(Path("photos/train"))
    write_bursts(Path("photos/test"), [0, 1, 40, 41], [5])
    results = finetune("vit", "photos", "run", *flags)
    near = results["in_trained_scenes"]["names"]
    assert [Path(name).name for name in near] == ["IMG_05.png", "IMG_15.png"]
    printed = results["printed"]
    assert (
        f"2 of 4 photos are of scenes that the model was trained on, such as {near[0]}" in printed
    )
    rows = pd.read_parquet("run/predictions.parquet")
    others = rows[~rows["image"].isin(near)]
    num_right = (others["label"] == others["prediction"]).sum()
    assert f"The others: {num_right} of 2 right (95%: " in printed


def test_copies_of_shots_of_a_scene_in_the_test_folder_are_still_named_as_copies() -> None:
    write_bursts(Path("photos/train"))
    for parity, name in enumerate(("cups", "pens")):
        Path("photos/test", name).mkdir(parents=True)
        for number in range(parity, 6, 2):
            shot = f"{name}/IMG_{number}{number % 5}.png"
            shutil.copy(f"photos/train/{shot}", f"photos/test/{shot}")
    results = finetune("vit", "photos", "run")
    assert "6 of the 6 held-out images are copies of training images" in results["printed"]
    assert "accuracy_interval" not in results
    assert "was trained on 6 of these images, on copies" in Path("run/README.md").read_text()


@pytest.mark.parametrize("kind", ["frozen", "steps"])
def test_evaluated_photos_that_nearly_repeat_training_photos_are_counted_and_the_others_measured(
    kind: str, of_bursts: Any, capsys: CaptureFixture
) -> None:
    """Shots of known scenes, one of them a training photo that was saved again, and other photos."""
    run = of_bursts
    photos = run["folder"].with_name("bursts")
    if kind == "steps":
        run = finetune("vit", photos, "run", "--max-steps", "1", "--held-out-fraction", "0")
    write_bursts(Path("more"), range(10, 16), [5])
    flower = photograph("flower.jpg")
    flower.resize((140, 100)).save("more/cups/flower.jpg")
    flower.crop((0, 0, 200, 200)).save("more/pens/flower.jpg")
    with Image.open(photos / "cups/IMG_00.png") as image:
        image.save("more/cups/WhatsApp.jpg", quality=70)
    reset_accelerate()
    capsys.readouterr()
    results = evaluate(run["folder"], "more")
    known = results["in_trained_scenes"]
    names = {f"{('cups', 'pens')[scene % 2]}/IMG_{scene}5.png" for scene in range(10, 16)}
    assert {*known["names"]} == names | {"cups/WhatsApp.jpg"}
    assert known["num_images"] == results["num_images"] == 9
    assert known["others"]["num_images"] == 2
    printed = capsys.readouterr().out
    assert "7 of 9 photos are of scenes that the model was trained on" in printed
    assert " of 2 right (95%: " in printed


def test_evaluated_shots_of_a_scene_count_once_in_the_interval(of_bursts: Any) -> None:
    write_bursts(Path("more"), range(10, 16), range(5, 10))
    reset_accelerate()
    results = evaluate(of_bursts["folder"], "more")
    low, _ = compute_proportion_interval(round(6 * results["accuracy"]), 6)
    assert results["accuracy_interval"][0] < low + 1e-6


def test_two_photos_alone_have_a_sentence_and_no_number() -> None:
    """They are shots of one scene."""
    write_shots(Path("shots/dusk"), 0, [0])
    write_shots(Path("shots/noon"), 0, [1])
    results = finetune("vit", "shots", "run")
    assert results.get("accuracy") is None
    printed = results["printed"]
    assert "not evaluated" in printed
    assert "--held-out-fraction" not in printed  # It could hold out nothing
    assert "no result measures classes with one image: dusk, noon. Add images" in printed
    assert "photos are shots of" not in printed


def test_a_photo_of_one_color_joins_no_scene() -> None:
    write_bursts(Path("photos"))
    Image.new("RGB", (140, 100)).save("photos/cups/lens cap.png")
    results = finetune("vit", "photos", "run")
    assert results["accuracy_interval"][0] < 0.5
    assert "80 of 81 photos are shots of " in results["printed"]


@pytest.mark.parametrize("kind", ["apart", "mixed", "damaged"])
def test_the_camera_is_named_if_each_class_has_its_own(kind: str) -> None:
    """By its model or, if a file states none, by its make."""
    for index, file in enumerate(list_photos()):
        exif = Image.Exif()
        is_second = index % 2 if kind == "mixed" else index >= 15
        exif[271 if is_second else 272] = "AB"[is_second]
        fields = exif if kind != "damaged" else b"Exif\0\0MM\0*\xff\xff\xff\xff"
        Image.open(file).save(file, exif=fields)
    results = finetune("vit", "my photos", "run")
    assert ("camera    ants is A, bees is B: " in results["printed"]) == (kind == "apart")
    if kind == "apart":
        record = results["frozen"]["findings"]["camera"]
        assert record["values"] == {"ants": "A", "bees": "B"}
        assert record["num_right"] == record["num_photos"]


def test_a_run_whose_second_class_is_unreadable_ends_and_another_class_cannot_be_added() -> None:
    for file in list_photos("my photos/bees"):
        file.write_bytes(b"no photo")
    Image.new("RGB", (30, 30)).save("my photos/ants/0.png")  # A property of the files
    finetune("vit", "my photos", "run")
    write_photos(Path("new"), range(3), "wasps")
    with raises_one_line("two old classes"):
        add_class("run", "new", "added")


def test_the_folder_above_the_class_is_named_if_each_class_of_a_table_has_its_own() -> None:
    os.renames("my photos/ants", "scans/ants")
    os.renames("my photos/bees", "phone/bees")
    rows = [f"{file},{file.parent.name}" for file in list_photos(".")]
    write_rows("table.csv", "image,label", rows)
    printed = finetune("vit", "table.csv", "run")["printed"]
    assert "camera    ants is scans, bees is phone: " in printed


def write_table(header: str, values: list[str]) -> None:
    """Write five shots of a scene for each of the values, and their table."""
    rows = []
    for scene, each in enumerate(values):
        write_shots(Path("scenes"), scene)
        rows += [f"scenes/IMG_{scene}{shot}.png,{each}" for shot in range(5)]
    write_rows("table.csv", header, rows)


def test_scenes_that_leave_no_folds_are_named_and_other_scenes_help() -> None:
    """Photos with several labels: each label is one scene."""

    tags = ["red|small", "blue"]
    write_table("image,label", tags)
    few = finetune("vit", "table.csv", "few", "--label-separator", "|")
    near = few["frozen"]["scenes"]
    first = near["pairs"][0][0]
    assert near["num_joined"] == 10
    reason = "not evaluated, because 10 photos share a scene with another one"
    assert f"{reason}, such as {first}" in few["printed"]

    write_table("image,label", 2 * tags)
    more = finetune("vit", "table.csv", "more", "--label-separator", "|")
    assert more["num_images"] == 20
    assert "not evaluated" not in more["printed"]


def test_classes_that_are_one_scene_each_have_no_number_and_cannot_be_held_out() -> None:
    for scene, name in enumerate(("vase", "bowl")):
        write_shots(Path("scenes") / name, scene, range(12))
    results = finetune("vit", "scenes", "run")
    assert "accuracy" not in results
    printed = results["printed"]
    assert "24 of 24 photos are shots of 2 scenes" in printed
    assert "not evaluated, because 24 photos share a scene with another one, such as " in printed
    reason = "no image can be held out, because the photos of each class are shots of one scene"
    with raises_one_line(reason):
        modeling_vitcls.finetune("vit", "scenes", "held-out", held_out_fraction=0.25)


def test_groups_of_one_label_each_are_the_reason_that_nothing_is_measured() -> None:
    write_table("image,label,place", ["vase,Nord", "bowl,South"])
    printed = finetune("vit", "table.csv", "run", "--group-column", "place")["printed"]
    reason = "each value of place has photos of one label only: Nord vase, South bowl"
    assert f"not evaluated, because {reason}" in printed


def test_shots_of_one_scene_in_all_classes_are_not_joined_and_a_line_says_so() -> None:
    """As for digits, which are alike to an encoder of photographs."""
    for name, first in (("on", 0), ("off", 6)):
        write_shots(Path("lamp") / name, 0, range(first, first + 6))
    results = finetune("vit", "lamp", "run")
    assert results["frozen"]["scenes"]["num_joined"] == 0
    assert "similar features for too many of these photos" in results["printed"]
