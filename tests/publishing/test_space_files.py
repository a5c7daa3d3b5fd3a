"""The files of a Space, without a browser. test_space.py tests the Space itself, and test_static_space.py the page."""

import ast
import importlib.metadata
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers.local_hub import LocalHub, Token
from helpers.tiny_models import raises_one_line
from huggingface_hub import constants
from packaging.requirements import Requirement
from PIL import Image

from modeling_vitcls.hub import connection
from modeling_vitcls.hub.revisions import HubCommit, resolve_commit
from modeling_vitcls.publishing.code_files import PACKAGE_FOLDER
from modeling_vitcls.publishing.publish import PushError
from modeling_vitcls.publishing.space import (
    PAGE_FILES,
    PublishedModel,
    build_space_files,
    find_published_model,
    push_space,
    write_space,
)
from modeling_vitcls.publishing.static_space import LIBRARY_FILES, TRANSFORMERS_JS_URL, build_static_space_files


WEIGHTS = HubCommit("ann/mine", "0" * 40, needs_token=False)
MODEL = PublishedModel(WEIGHTS)
CODE = HubCommit("ann/code", "c" * 40, needs_token=True)
ADDRESS = f"{constants.ENDPOINT}/ann/mine"


def read(files: dict[str, Path | bytes], name: str) -> str:
    content = files[name]
    return (content if isinstance(content, bytes) else content.read_bytes()).decode()


def read_card(files: dict[str, Path | bytes]) -> tuple[dict[str, Any], str]:
    """Return the settings and the text of README.md."""
    header, text = read(files, "README.md").split("---\n")[1:]
    return yaml.safe_load(header), text


def test_every_required_library_has_a_minimum_version() -> None:
    requirements = [Requirement(line) for line in read(build_space_files(MODEL), "requirements.txt").splitlines()]
    assert {"torch", "transformers", "matplotlib"} <= {requirement.name for requirement in requirements}
    declared = {Requirement(line) for line in importlib.metadata.requires("modeling_vitcls") or ()}
    assert set(requirements) <= {Requirement(f"{each.name}{each.specifier}") for each in declared}
    for requirement in requirements:
        assert [specifier.operator for specifier in requirement.specifier] == [">="], requirement


@pytest.mark.parametrize("name", PAGE_FILES)
def test_page_files_import_only_page_files_from_the_package(name: str) -> None:
    folders = Path(name).parent.parts
    for statement in ast.walk(ast.parse((PACKAGE_FOLDER / name).read_text(encoding="utf-8"))):
        if isinstance(statement, ast.ImportFrom) and statement.level:
            module = Path(*folders[: len(folders) + 1 - statement.level], *str(statement.module).split("."))
            assert f"{module.as_posix()}.py" in PAGE_FILES, f"{name} imports {module}"


@pytest.mark.parametrize("code", [None, CODE])
def test_the_app_loads_the_commits_of_weights_and_code(code: HubCommit | None) -> None:
    files = build_space_files(PublishedModel(WEIGHTS, code))
    names: dict[str, Any] = {}
    for statement in ast.parse(read(files, "app.py")).body:
        if isinstance(statement, ast.Assign):
            exec(compile(ast.Module([statement], []), "app.py", "exec"), names)
    assert (names["MODEL"], names["COMMIT"]) == ("ann/mine", "0" * 40)
    assert names["CODE_COMMIT"] == (None if code is None else code.sha)
    warning = "The app runs the code in ann/code." if code else "The app runs the model's code."
    assert warning in read(files, "app.py")
    settings, text = read_card(files)
    assert settings["title"] == "mine: labels and attention" and settings["models"] == ["ann/mine"]
    assert settings["app_file"] == "app.py" and settings["license"] == "apache-2.0"
    assert settings["sdk"] == "gradio" and settings["sdk_version"] == importlib.metadata.version("gradio")
    assert settings["python_version"] == f"{sys.version_info.major}.{sys.version_info.minor}"
    assert f"[`{'0' * 40}`]({ADDRESS}/tree/{'0' * 40})" in text and f"[ann/mine]({ADDRESS})" in text
    code_link = f"[`{'c' * 40}`]({constants.ENDPOINT}/ann/code/tree/{'c' * 40})"
    assert ("ann/code" in text and code_link in text) is (code is not None)
    assert {f"vitcls_demo/{name}": PACKAGE_FOLDER / name for name in PAGE_FILES}.items() <= files.items()
    assert read_card(build_space_files(MODEL, title="My: model"))[0]["title"] == "My: model"


def test_a_space_requires_gradio(monkeypatch: pytest.MonkeyPatch) -> None:
    def find_version(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", find_version)
    with raises_one_line("gradio is not installed. Run `pip install gradio`"):
        build_space_files(MODEL)


@pytest.mark.parametrize(("needs_token", "code"), [(False, None), (True, None), (True, CODE)])
def test_private_weights_or_code_require_a_token(needs_token: bool, code: HubCommit | None) -> None:
    weights = HubCommit("ann/mine", "0" * 40, needs_token=needs_token and code is None)
    assert PublishedModel(weights, code).needs_token is needs_token


def test_examples_are_images_with_unique_names(tmp_path: Path) -> None:
    for name in ("a/1.png", "b/1.png", "a/2.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("L", (4, 4)).save(tmp_path / name)
    files = build_space_files(MODEL, examples=[tmp_path / "a/1.png", tmp_path / "a/2.png"])
    assert {name: files[name] for name in files if name.startswith("examples/")} == {
        f"examples/{number}.png": tmp_path / f"a/{number}.png" for number in (1, 2)
    }
    with raises_one_line("two examples have the same name, 1.png"):
        build_space_files(MODEL, examples=[tmp_path / "a/1.png", tmp_path / "b/1.png"])
    (tmp_path / "notes.png").write_text("no image")
    with raises_one_line("notes.png", "not an image in a supported format"):
        build_space_files(MODEL, examples=[tmp_path / "notes.png"])


def test_the_files_of_a_static_space(tmp_path: Path) -> None:
    for name in ("export/config.json", "export/onnx/model.onnx", *(f"packages/{name}" for name in LIBRARY_FILES)):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    page = {"index.html", "app.js", "README.md", "model/config.json", "model/onnx/model.onnx"}
    files = build_static_space_files(MODEL, tmp_path / "export", "Digits & more")
    assert set(files) == page
    assert f'"transformers.js": "{TRANSFORMERS_JS_URL}"' in read(files, "index.html")
    assert "<h1>Digits &amp; more</h1>" in read(files, "index.html")
    settings, text = read_card(files)
    assert settings["sdk"] == "static" and settings["models"] == ["ann/mine"] and "sdk_version" not in settings
    assert settings["title"] == "Digits & more" and f"commit [`{'0' * 40}`]" in text
    files = build_static_space_files(MODEL, tmp_path / "export", node_modules=tmp_path / "packages")
    library = {f"transformers.js/{Path(name).name}": f"packages/{name}" for name in LIBRARY_FILES}
    assert set(files) == page | set(library)
    assert {name: read(files, name) for name in library} == library
    assert '"transformers.js": "./transformers.js/transformers.min.js"' in read(files, "index.html")
    assert read_card(files)[0]["title"] == "mine: labels and attention in the browser"
    (tmp_path / "packages" / LIBRARY_FILES[2]).unlink()
    with raises_one_line(f"--node-modules requires {LIBRARY_FILES[2]}", "npm install @huggingface/transformers@"):
        build_static_space_files(MODEL, tmp_path / "export", node_modules=tmp_path / "packages")


def test_files_are_written_to_an_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "source.txt").write_text("text")
    files: dict[str, Path | bytes] = {"app.py": b"code", "a/1.txt": tmp_path / "source.txt", "a/2.txt": b"2"}
    write_space(files, tmp_path / "new" / "space")
    written = {name: (tmp_path / "new" / "space" / name).read_bytes() for name in files}
    assert written == {"app.py": b"code", "a/1.txt": b"text", "a/2.txt": b"2"}
    with raises_one_line("not empty"):
        write_space(files, tmp_path / "new")


# The Hub -------------------------------------------------------------------------------------------------------------


def test_a_push_replaces_only_the_files_of_the_page(hub: LocalHub) -> None:
    """Other files of the Space, such as images in the description, are kept."""
    first: dict[str, Path | bytes] = {
        "app.py": b"1",
        "vitcls_demo/old.py": b"1",
        "examples/1.png": b"1",
        "model/x": b"1",
        "model/z": b"1",
    }
    push_space(first | {"notes/mine.md": b"1", "mine.txt": b"1"}, MODEL, "ann/demo", private=True)
    assert hub.repositories["spaces/ann/demo"].private
    pushed = push_space({"app.py": b"2", "model/x": b"2", "model/y": b"2"}, MODEL, "ann/demo")
    assert pushed.url == f"{hub.url}/spaces/ann/demo"
    repository = hub.repositories["spaces/ann/demo"]
    assert repository.branches["main"] == pushed.commit
    assert repository.commits[pushed.commit].message == "Show ann/mine at 0000000"
    names = set(hub.files("spaces/ann/demo")) - {".gitattributes"}
    assert names == {"app.py", "model/x", "model/y", "notes/mine.md", "mine.txt"}
    assert {hub.read("spaces/ann/demo", name) for name in ("app.py", "model/x", "model/y")} == {b"2"}
    unchanged = push_space({"app.py": b"2", "model/x": b"2", "model/y": b"2"}, MODEL, "ann/demo")
    assert unchanged.commit == pushed.commit and len(repository.commits) == 3  # the first was created with the Space
    push_space(first, MODEL, "ann/other")
    assert not hub.repositories["spaces/ann/other"].private
    hub.tokens["hf_ann"] = Token("ann", {"lab": "write"})
    hub.private_by_default.add("lab")
    push_space(first, MODEL, "lab/demo")
    assert hub.repositories["spaces/lab/demo"].private


def test_two_simultaneous_pushes_of_a_space_do_not_mix_their_files(
    hub: LocalHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first push arrives after the second, on which it is not based, and is built again."""
    monkeypatch.setattr(connection, "RETRY_WAITS", (0.01,))
    hub.fail("POST", "/spaces/ann/demo/commit/", "hold")
    pushing = threading.Thread(target=push_space, args=({"app.py": b"1"}, MODEL, "ann/demo"))
    pushing.start()
    deadline = time.monotonic() + 60
    while not hub.count_requests("POST", "/spaces/ann/demo/commit/") and time.monotonic() < deadline:
        time.sleep(0.01)
    push_space({"app.py": b"2", "examples/1.png": b"2"}, MODEL, "ann/demo")
    assert hub.read("spaces/ann/demo", "app.py") == b"2"
    hub.released.set()
    pushing.join(timeout=60)
    assert hub.read("spaces/ann/demo", "app.py") == b"1"
    assert hub.files("spaces/ann/demo").keys() == {".gitattributes", "app.py"}


@pytest.mark.parametrize("private", [False, True])
def test_a_failed_push_names_the_command(hub: LocalHub, private: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "RETRY_WAITS", (0.01,))
    hub.fail("POST", "/spaces/ann/demo/commit/", 403)
    command = f"vitcls space --model ann/mine --revision {'0' * 40} --space-id ann/demo --title 'a b'"
    with pytest.raises(PushError, match="HTTP 403") as raised:
        push_space({"app.py": b"1"}, MODEL, "ann/demo", private=private, flags=["--title", "a b"])
    assert str(raised.value).endswith(f"Finish with: {command}{' --private' if private else ''}")


def test_models_that_a_space_cannot_load_are_errors(
    hub: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    config = b'{"model_type": "vitcls", "auto_map": {"AutoModel": "modeling_vitcls.ViTCLSModel"}}'
    hub.create("ann/mine", private=True, files={"config.json": config, "preprocessor_config.json": b"{}"})
    found = find_published_model("ann/mine")
    assert (found.repo_id, found.commit) == ("ann/mine", hub.repositories["ann/mine"].branches["main"])
    assert found.code_commit is None and found.needs_token
    hub.repositories["ann/mine"].commit("main", "broken", {"config.json": hub.store("config.json", b"{}")})
    assert find_published_model("ann/mine", found.commit) == found
    shared = config.replace(b'"modeling', b'"ann/code--modeling')
    hub.create("ann/code", private=False, files={})
    hub.create("ann/shared", private=False, files={"config.json": shared, "preprocessor_config.json": b"{}"})
    assert find_published_model("ann/shared").code_commit == resolve_commit("ann/code")
    for name, content in {
        "other": b'{"model_type": "vit", "auto_map": {"AutoModel": "modeling.Model"}}',
        "without-code": b'{"model_type": "vitcls"}',
    }.items():
        hub.create(f"ann/{name}", private=False, files={"config.json": content, "preprocessor_config.json": b"{}"})
        with raises_one_line(f"ann/{name} at ", "does not contain a vitcls model with its code"):
            find_published_model(f"ann/{name}")
    hub.create("ann/empty", private=False)
    with raises_one_line("does not contain a vitcls model with its code"):
        find_published_model("ann/empty")
    hub.create("ann/unprocessed", private=False, files={"config.json": config})
    with raises_one_line("ann/unprocessed has no preprocessor_config.json"):
        find_published_model("ann/unprocessed")
    with raises_one_line("no/such/folder is not a folder"):
        find_published_model("no/such/folder")
    (tmp_path / "run").mkdir()
    monkeypatch.chdir(tmp_path / "run")
    with raises_one_line("is a folder", "vitcls push --model . --hub-model-id YOUR-NAME/run"):
        find_published_model(".")
