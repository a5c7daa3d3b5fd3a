"""Held-out images: stable if datasets grow or move, and used by evaluations of the run's model."""

import hashlib
import json
import shutil
from collections import Counter
from dataclasses import asdict, replace
from itertools import chain
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from helpers.accelerate_state import reset_accelerate
from helpers.photo_folders import write_photos
from helpers.tiny_models import build_tiny_config, raises_one_line
from helpers.tiny_options import build_tiny_options, run_training

from modeling_vitcls.analysis.inspection_images import open_images
from modeling_vitcls.analysis.options import InspectOptions
from modeling_vitcls.data.evaluated_images import load_evaluation_data
from modeling_vitcls.data.held_out import (
    HeldOutRecord,
    HeldOutRule,
    compute_image_key,
    read_held_out_record,
)
from modeling_vitcls.data.in_memory import add_dataset
from modeling_vitcls.data.options import DataOptions
from modeling_vitcls.data.splits import describe_copies, load_training_data
from modeling_vitcls.hub.model_folder import ModelFolder
from modeling_vitcls.inference.evaluate import evaluate_checkpoint
from modeling_vitcls.inference.load_model import load_model
from modeling_vitcls.inference.options import EvaluateOptions
from modeling_vitcls.model.modeling_vitcls import ViTCLSModel
from modeling_vitcls.publishing.published_files import list_published_files
from modeling_vitcls.training.finetune import describe_overlap
from modeling_vitcls.training.model import resolve_initial_model


pytestmark = pytest.mark.usefixtures("fresh_accelerate")


def read(dataset: object, **options: Any) -> Any:
    return load_training_data(DataOptions(str(dataset), **options))


def get_names(part: Any) -> set[str]:
    return set(part.images.get_names())


def run(output: Path, dataset: Path, **flags: Any) -> dict[str, Any]:
    """Fine-tune for two steps and return the contents of results.json."""
    return run_training(build_tiny_options(output, dataset, max_steps=2, batch_size=8, **flags))


def evaluate(model: Path, dataset: Path, split: str | None = None, **data: Any) -> dict[str, Any]:
    reset_accelerate()
    return evaluate_checkpoint(
        EvaluateOptions(str(model), DataOptions(str(dataset), num_workers=0, **data), split)
    )


# Selection ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("fraction", [0.01, 0.2, 0.5, 0.95])
def test_the_split_is_stratified(fraction: float, tmp_path: Path) -> None:
    """Each class with two or more images has held-out images in proportion to its size."""
    sizes = {"ant": 1, "bee": 2, "cat": 3, "dog": 40, "elk": 7}
    write_photos(tmp_path / "photos", range(max(sizes.values())), *sizes)
    for name, size in sizes.items():
        for number in range(size, max(sizes.values())):
            (tmp_path / "photos" / name / f"{number}.png").unlink()
    data = read(tmp_path / "photos", held_out_fraction=fraction)
    names = data.label_space.names
    counts = [
        Counter(names[label] for label in part.labels) for part in (data.train, data.held_out)
    ]
    expected = {
        name: 0 if size == 1 else min(max(round(fraction * size), 1), size - 1)
        for name, size in sizes.items()
    }

    assert counts[1] == Counter(expected)
    assert counts[0] + counts[1] == Counter(sizes)
    assert "stratified" in data.held_out_name
    assert data.class_ratio == max(counts[0].values()) / min(counts[0].values())


def test_the_folds_are_stratified(tmp_path: Path) -> None:
    """The images by which classes exceed a multiple of the folds are divided among the folds."""
    folder = write_photos(tmp_path / "photos", range(13), "ant", "cat")
    folds = [read(folder, folds=3, fold=fold) for fold in (1, 2, 3)]
    assert [Counter(fold.held_out.labels) for fold in folds] == [
        {0: 5, 1: 4},
        {0: 4, 1: 5},
        {0: 4, 1: 4},
    ]
    assert len(set.union(*(get_names(fold.held_out) for fold in folds))) == 26
    assert folds[1].record.rule == HeldOutRule(1 / 3, 0, num_folds=3, fold=2)


def test_the_split_of_tags_is_not_stratified(tmp_path: Path) -> None:
    paths = sorted(write_photos(tmp_path / "photos", range(30)).glob("*/*.png"))
    # one tag is enough
    rows = [f"{path},{'x' if index % 2 else ''}" for index, path in enumerate(paths)]
    (tmp_path / "tags.csv").write_text("\n".join(["image,label", *rows]), encoding="utf-8")
    assert "not stratified" in read(tmp_path / "tags.csv", label_separator="|").held_out_name


def test_relative_paths_in_memory_do_not_depend_on_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held_out = []
    for folder in (tmp_path / "a", tmp_path / "a" / "b"):
        write_photos(folder / "photos", range(20))
        monkeypatch.chdir(folder)
        pairs = [
            (f"photos/{name}/{index}.png", name) for name in ("cat", "dog") for index in range(20)
        ]
        held_out.append(get_names(load_training_data(DataOptions(add_dataset(pairs))).held_out))
    assert held_out[0] == held_out[1]


def test_the_split_depends_only_on_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_photos(tmp_path / "here", range(40))
    held_out = get_names(read(folder, split_seed=3).held_out)
    assert held_out != get_names(read(folder, split_seed=4).held_out)

    folder.rename(tmp_path / "there")
    assert get_names(read(tmp_path / "there", split_seed=3).held_out) == held_out

    monkeypatch.chdir(tmp_path)
    moved = read("there/cat/..", split_seed=3)
    assert get_names(moved.held_out) == held_out
    assert moved.name == "there"

    rows = [
        f"there/{path.relative_to(tmp_path / 'there')},x"
        for path in (tmp_path / "there").glob("*/*.png")
    ]
    (tmp_path / "list.csv").write_text(
        "\n".join(["image,label", *rows[:40], "a.png,y", *rows[40:]]), encoding="utf-8"
    )
    listed = get_names(read("list.csv", split_seed=3).held_out)
    (tmp_path / "list.csv").write_text(
        "\n".join(["image,label", "a.png,y", *rows[::-1]]), encoding="utf-8"
    )
    assert get_names(read("list.csv", split_seed=3).held_out) == listed  # in any order


def test_images_without_paths_are_selected_by_row_on_disk_and_by_content_in_memory(
    tmp_path: Path,
) -> None:
    """In memory, equal images are on the same side, in any order.

    On disk, only images of the same size are read.
    """
    paths = sorted(write_photos(tmp_path / "photos", range(30)).glob("*/*.png"))
    pairs = [(path.read_bytes(), path.parent.name) for path in paths]
    found = []

    for order in (pairs, pairs[::-1], pairs + pairs):
        data = load_training_data(DataOptions(add_dataset(order)))
        found.append({image.tobytes() for image in data.held_out.images})
        assert not found[-1] & {image.tobytes() for image in data.train.images}
    assert found[0] == found[1] == found[2]
    assert len(found[0]) == 12

    unreadable = [b"unreadable %d" % row for row in range(60)]
    rows = {"image": unreadable, "label": [label for _, label in pairs]}
    datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "table.parquet")
    held_out = read(tmp_path / "table.parquet").held_out
    assert len(held_out) == 12
    assert len(get_names(held_out)) == 12
    assert get_names(held_out) <= set(map(str, range(60)))

    keys = [compute_image_key(f"row {row}".encode()) for row in held_out.images.get_names()]
    assert held_out.images.compute_keys().tolist() == keys


def test_the_held_out_images_of_a_dataset_never_change() -> None:
    """Later versions of the package evaluate a model on images it was not trained on."""

    def hash_text(text: str) -> int:
        return int(hashlib.blake2b(text.encode(), digest_size=8).hexdigest(), 16)

    for purpose, prefix in (("", "3"), ("selection", "3 selection")):
        held_out = {key for key in range(200) if HeldOutRule(0.3, 3, purpose).is_held_out(key)}
        assert held_out == {key for key in range(200) if hash_text(f"{prefix} {key}") < 0.3 * 2**64}
    assert [compute_image_key(name.encode()) for name in "abc"] == [
        hash_text(name) // 2 for name in "abc"
    ]


def test_each_image_is_in_one_fold() -> None:
    """The folds divide the range of the hash into equal parts.

    A record selects the same fold again.
    """
    rules = [HeldOutRule(0.2, 1, num_folds=3, fold=fold) for fold in (1, 2, 3)]
    folds = [[key for key in range(6000) if rule.is_held_out(key)] for rule in rules]
    assert sorted(chain.from_iterable(folds)) == list(range(6000))
    assert all(abs(len(fold) - 2000) < 5 * (6000 * 2 / 9) ** 0.5 for fold in folds)
    assert folds[0] == [key for key in range(6000) if HeldOutRule(1 / 3, 1).is_held_out(key)]

    record = HeldOutRecord.from_keys(rules[1], np.array(folds[1]))
    assert record.rule == rules[1]
    assert str(record.rule) == "fold 2 of 3, by checksum, split seed 1"
    assert (record.num_images, record.split) == (len(folds[1]), None)
    for keys in ([20, 3, 3], [3, 20, 3]):  # equal images have equal keys
        assert (
            HeldOutRecord.from_keys(rules[1], np.array(keys)).sha256
            == hashlib.sha256(b"3 3 20").hexdigest()
        )


def test_copies_of_an_image_are_on_the_same_side(tmp_path: Path) -> None:
    """The other images stay on their sides."""
    folder = write_photos(tmp_path, range(30))
    before = get_names(read(folder).held_out)
    for path in sorted(folder.glob("cat/*.png")):
        shutil.copyfile(path, path.with_name(f"copy {path.name}"))

    data = read(folder)

    held_out = get_names(data.held_out)
    assert {name for name in held_out if "dog" in name} == {
        name for name in before if "dog" in name
    }
    cats = {name for name in held_out if "cat" in name}
    assert len(cats) == 12
    assert {name.replace("copy ", "") for name in cats} == {
        name for name in cats if "copy" not in name
    }
    with_copies = data.build_record()
    evaluated = load_evaluation_data(DataOptions(str(folder)), None, with_copies)
    assert get_names(evaluated.images) == held_out


def test_copies_in_the_held_out_split_are_reported(tmp_path: Path) -> None:
    write_photos(tmp_path / "train", range(10))
    write_photos(tmp_path / "test", range(8, 13))
    (warning,) = describe_copies(read(tmp_path))
    assert "4 of the 10 held-out images" in warning
    write_photos(tmp_path / "test", range(20, 25))
    for name in ("cat", "dog"):
        for number in (8, 9):
            (tmp_path / "test" / name / f"{number}.png").unlink()
    assert describe_copies(read(tmp_path)) == []


def test_empty_parts_are_errors(tmp_path: Path) -> None:
    folder = write_photos(tmp_path, range(1))
    with raises_one_line("each of the 2 classes has a single image", "`held_out_fraction=0`"):
        read(folder)
    with raises_one_line("none of the 2 images", "larger `held_out_fraction`"):
        load_training_data(DataOptions(str(folder), held_out_fraction=1e-9), use_labels=False)
    with raises_one_line("all 2 images", "smaller `held_out_fraction`"):
        load_training_data(DataOptions(str(folder), held_out_fraction=0.999), use_labels=False)


# The record ---------------------------------------------------------------------------------------


def test_evaluation_uses_the_held_out_images_of_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Evaluate and inspect without --split-seed, for any --split-seed of the run.

    The record is published.
    """
    folder = write_photos(tmp_path / "photos", range(50))
    trained = run(tmp_path / "run", folder, split_seed=7, held_out_fraction=0.3)
    held_out = read(folder, split_seed=7, held_out_fraction=0.3).held_out
    expected = HeldOutRecord.from_keys(HeldOutRule(0.3, 7), held_out.images.compute_keys())

    recorded = read_held_out_record(ModelFolder(tmp_path / "run"))
    assert recorded == read(folder, split_seed=7, held_out_fraction=0.3).build_record()
    assert recorded.sha256 == expected.sha256

    measured = evaluate(tmp_path / "run", folder)
    for name in ("num_images", "accuracy", "confusion_matrix"):
        assert measured[name] == trained[name]
    assert measured["loss"] == pytest.approx(trained["loss"], abs=1e-5)
    assert measured["images"] == "held_out"
    assert "WARNING" not in capsys.readouterr().out
    with raises_one_line("`split_seed` is 3", "7"):
        evaluate(tmp_path / "run", folder, split_seed=3)
    with raises_one_line("`held_out_fraction` is 0.5", "0.3"):
        evaluate(tmp_path / "run", folder, held_out_fraction=0.5)

    same = DataOptions(str(folder), split_seed=7, held_out_fraction=0.3)
    assert get_names(load_evaluation_data(same, None, recorded).images) == get_names(held_out)
    assert "results.json" in list_published_files(ModelFolder(tmp_path / "run"))

    model, _ = load_model(ModelFolder(tmp_path / "run"), use_head=True)
    options = InspectOptions(str(tmp_path / "run"), dataset=str(folder))
    images = open_images(options, model, read_held_out_record(ModelFolder(tmp_path / "run")))
    assert images.images.get_names() == held_out.images.get_names()
    (tmp_path / "run" / "results.json").unlink()
    assert "metrics.jsonl" in list_published_files(ModelFolder(tmp_path / "run"))


def test_the_label_columns_of_a_run_are_used_in_its_evaluation(tmp_path: Path) -> None:
    """A model has the names of its tasks; results.json has the column and the separator of tags."""
    paths = sorted(write_photos(tmp_path / "photos", range(10)).glob("*/*.png"))
    rows = [
        f"{path},{path.parent.name}|all,{'old' if index % 2 else 'new'}"
        for index, path in enumerate(paths)
    ]
    (tmp_path / "table.csv").write_text("\n".join(["image,tags,age", *rows]), encoding="utf-8")

    for name, flags in (
        ("tags", {"label_column": "tags", "label_separator": "|"}),
        ("tasks", {"label_column": ["age", "tags"]}),
    ):
        reset_accelerate()
        results = run(tmp_path / name, tmp_path / "table.csv", **flags)
        metric = results["selection_metric"]
        assert evaluate(tmp_path / name, tmp_path / "table.csv")[metric] == pytest.approx(
            results[metric], abs=1e-5
        )
    with raises_one_line("`label_column`"):  # the flags are used as a whole
        evaluate(tmp_path / "tags", tmp_path / "table.csv", label_separator="|")


def test_rare_classes_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """With a ratio above 10, the run names --class-balance, and step lines contain macro F1."""
    for num_dogs, is_rare in ((50, True), (44, False)):
        folder = tmp_path / f"{num_dogs}"
        for name, count in (
            ("cat", 5),
            ("dog", num_dogs),
        ):  # 4 training images of cats; 45 or 40 of dogs
            write_photos(folder / "photos", range(count), name)
        reset_accelerate()
        capsys.readouterr()
        run(folder / "run", folder / "photos", held_out_fraction=0.1)
        output = capsys.readouterr().out
        assert ("`class_balance='weights'`" in output) is is_rare
        steps = [
            line for line in output.splitlines() if line.startswith("step ") and "held out" in line
        ]
        assert steps
        assert all(("macro f1" in line) is is_rare for line in steps)


@pytest.mark.parametrize(
    ("trained", "other", "flags"),
    [
        ({}, {}, ""),
        ({"held_out_fraction": 0.4}, {}, ""),
        ({}, {"held_out_fraction": 0.4}, "`held_out_fraction=0.2` and `split_seed=0`"),
        ({}, {"split_seed": 1}, "`held_out_fraction=0.2` and `split_seed=0`"),
        (
            {"folds": 3, "fold": 2},
            {"folds": 3, "fold": 1},
            "`folds=3`, `fold=2` and `split_seed=0`",
        ),
    ],
)
def test_a_model_trained_on_held_out_images_is_named(
    trained: dict[str, Any], other: dict[str, Any], flags: str, tmp_path: Path
) -> None:
    folder = write_photos(tmp_path / "photos", range(30))
    model = tmp_path / "model"
    ViTCLSModel(build_tiny_config()).save_pretrained(model)
    initial = resolve_initial_model(str(model))
    first = read(folder, **trained)
    second = read(folder, **other)

    assert not describe_overlap(initial, second)  # no results.json

    results = {"dataset": first.name, "held_out": asdict(first.record)}
    (model / "results.json").write_text(json.dumps(results), encoding="utf-8")
    initial = resolve_initial_model(str(model))
    warnings = describe_overlap(initial, second)
    assert len(warnings) == bool(flags)
    assert all(flags in warning for warning in warnings)
    assert bool(get_names(first.train) & get_names(second.held_out)) == bool(flags)
    assert not describe_overlap(initial, replace(second, name="another dataset"))
    assert not describe_overlap(replace(initial, folder=None), second)
    assert not describe_overlap(initial, replace(second, record=HeldOutRecord("test", 5)))


def test_a_split_of_the_dataset_is_recorded_and_evaluated(tmp_path: Path) -> None:
    write_photos(tmp_path / "photos" / "train", range(20))
    write_photos(tmp_path / "photos" / "val", range(20, 30))
    trained = run(tmp_path / "run", tmp_path / "photos")
    record = read_held_out_record(ModelFolder(tmp_path / "run"))

    assert record is not None
    assert (record.split, record.num_images, record.rule) == ("validation", 20, None)

    measured = evaluate(tmp_path / "run", tmp_path / "photos")
    assert (measured["split"], measured["num_images"], measured["images"]) == (
        "validation",
        20,
        "whole",
    )
    assert measured["accuracy"] == trained["accuracy"]
    assert evaluate(tmp_path / "run", tmp_path / "photos", "train")["num_images"] == 40
    with raises_one_line("'test'", "train, validation"):
        evaluate(tmp_path / "run", tmp_path / "photos", "test")


def test_damaged_records_are_named(tmp_path: Path) -> None:
    ViTCLSModel(build_tiny_config()).save_pretrained(tmp_path)
    assert read_held_out_record(ModelFolder(tmp_path)) is None
    for text in ("{", "[]", '{"held_out": {"seed": 1}}', '{"held_out": 3}'):
        (tmp_path / "results.json").write_text(text, encoding="utf-8")
        with raises_one_line("results.json is damaged", "Remove it"):
            read_held_out_record(ModelFolder(tmp_path))
    (tmp_path / "results.json").write_text('{"split": "20%, stratified"}', encoding="utf-8")
    assert read_held_out_record(ModelFolder(tmp_path)) is None
