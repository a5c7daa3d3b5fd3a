"""`scripts/push_space.py`: the files of a Space, pushes, and contradicting flags."""

import importlib.metadata
from pathlib import Path

from helpers.local_hub import LocalHub
from helpers.tiny_models import raises_one_line, save_classifier
from huggingface_hub import SpaceCard
from packaging.requirements import Requirement
from pytest import MonkeyPatch

from modeling_vitcls.hub.model_folder import ModelFolder
from modeling_vitcls.publishing.push import push_folder
from modeling_vitcls.runtime.files import write_json
from scripts.push_space import SpaceOptions, run
from scripts.space.space import find_published_model


def test_a_space_shows_a_commit_of_a_model(hub: LocalHub, tmp_path: Path) -> None:
    first = push_folder(ModelFolder(save_classifier(tmp_path / "mine")), "ann/mine").sha
    newest = hub.repositories["ann/mine"].commit("main", hub.files("ann/mine"))
    photos = (tmp_path / "a/photo.png", tmp_path / "b/photo.png")  # equal names
    for photo in photos:
        photo.parent.mkdir()
        photo.write_text(str(photo))
    files = {"examples/old.png": b"old", "notes.md": b"mine"}
    hub.create("spaces/ann/mine-demo", files=files)
    run(SpaceOptions(f"ann/mine@{first}", examples=photos))
    names = {
        "README.md",
        "app.py",
        "requirements.txt",
        "examples/0_photo.png",
        "examples/1_photo.png",
    }
    space = {
        name: hub.read("spaces/ann/mine-demo", name).decode()
        for name in hub.files("spaces/ann/mine-demo")
    }
    assert space.keys() == names | {"notes.md"}
    assert space["examples/1_photo.png"] == str(photos[1])
    assert "MODEL = 'ann/mine'\n" in space["app.py"]
    assert f"COMMIT = '{first}'\n" in space["app.py"]

    card = SpaceCard(space["README.md"]).data
    assert card.sdk == "gradio"
    assert card.sdk_version == importlib.metadata.version("gradio")
    assert card.models == ["ann/mine"]
    assert card.app_file == "app.py"
    assert f"{hub.url}/ann/mine/tree/{first}" in space["README.md"]
    requirements = {Requirement(line).name for line in space["requirements.txt"].split()}
    assert requirements >= {"torch", "transformers"}

    run(SpaceOptions("ann/mine", output=tmp_path / "space"))
    assert f"COMMIT = '{newest}'\n" in (tmp_path / "space/app.py").read_text()
    with raises_one_line("not empty"):
        run(SpaceOptions("ann/mine", output=tmp_path / "space"))


def test_weights_of_private_models_are_published_in_private_spaces_only(
    hub: LocalHub,
    tmp_path: Path,
    monkeypatch: MonkeyPatch,
) -> None:
    """The weights are published only in a private Space.

    The export is replaced, because it takes seconds.
    """
    commit = push_folder(
        ModelFolder(save_classifier(tmp_path / "mine")), "ann/mine", private=True
    ).sha

    def export(source: str, folder: Path) -> None:
        folder.mkdir(parents=True)
        write_json(folder / "config.json", {"id2label": {"0": "cat"}, "source": source})

    monkeypatch.setattr("space.transformers_js.export_for_transformers_js", export)
    with raises_one_line("ann/mine", "--private"):
        run(SpaceOptions("ann/mine", static=True))
    run(SpaceOptions("ann/mine", static=True, private=True, space_id="page"))
    assert hub.repositories["spaces/ann/page"].private
    names = {".gitattributes", "README.md", "index.html", "app.js", "model/config.json"}
    assert set(hub.files("spaces/ann/page")) == names
    card = SpaceCard(hub.read("spaces/ann/page", "README.md").decode())
    assert card.data.sdk == "static"
    assert card.data.models == ["ann/mine"]
    assert f'"ann/mine@{commit}"' in hub.read("spaces/ann/page", "model/config.json").decode()
    run(SpaceOptions("ann/mine"))
    assert not hub.repositories["spaces/ann/mine-demo"].private


def test_a_space_requires_a_model_on_the_hub(hub: LocalHub, tmp_path: Path) -> None:
    code = b'{"model_type": "vitcls", "auto_map": {"AutoModel": "modeling_vitcls.ViTCLSModel"}}'
    classifier = code.replace(b"{", b'{"architectures": ["ViTCLSForImageClassification"], ', 1)
    for name, config in (
        ("ann/vit", code.replace(b"cls", b"")),
        ("ann/code", b'{"model_type": "vitcls"}'),
    ):
        hub.create(name, files={"config.json": config, "preprocessor_config.json": b"{}"})
    hub.create("ann/bare", files={"config.json": classifier})
    hub.create("ann/encoder", files={"config.json": code})

    remedies = {
        str(tmp_path): f"vitcls push --model {tmp_path} ",
        "ann/vit": "vitcls convert",
        "ann/code": "vitcls convert",
        "ann/encoder": "classifier",
        "ann/bare": "preprocessor_config.json",
        "ann/none": "no such model",
    }
    for source, remedy in remedies.items():
        with raises_one_line(source, remedy, error=(ValueError, OSError)):
            find_published_model(source)
