"""Checkpoints with their own code, loaded in processes that cannot import this package.

The child processes run load_without_package.py. One loads the checkpoints of this process and saves
them, the next loads those. This process runs the same script with the classes of the package; the
outputs must be equal to the bit.
"""

import ast
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.doc_pages import PACKAGE, ROOT
from helpers.fresh_processes import run_python
from helpers.load_without_package import AUTO_CLASSES, SEED, compute_outputs, main
from helpers.photo_folders import get_file_names
from helpers.released_models import KINDS, SIZES
from helpers.tiny_models import assert_same_bits, randomize, save_both
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers.dynamic_module_utils import get_imports, get_relative_imports

import modeling_vitcls as vitcls
from modeling_vitcls.runtime.files import read_json


SHIPPED_FILES = sorted((PACKAGE / "model").glob("*_vitcls.py"))
ALLOWED_LIBRARIES = {
    "torch",
    "transformers",
    "huggingface_hub",
    "PIL",
    "numpy",
} | sys.stdlib_module_names
CHILD = ROOT / "tests/helpers/load_without_package.py"

# Name of the checkpoint -> its class and configuration fields.
CHECKPOINTS = {name: (model_class, fields) for name, (model_class, fields, _) in KINDS.items()}
CHECKPOINTS["backbone"] = (vitcls.ViTCLSBackbone, {"out_features": ["stage1", "stage2"]})
CHECKPOINTS["attention"] = (vitcls.ViTCLSModel, {"pooling": "attention"})
CHECKPOINTS["added task"] = (
    vitcls.ViTCLSForImageClassification,
    {"extra_heads": {"parity": {"labels": ["odd", "even"]}}},
)
GENERATIONS = ("first", pytest.param("second", marks=pytest.mark.slow))

each_checkpoint = pytest.mark.parametrize("name", CHECKPOINTS)
each_auto_class = pytest.mark.parametrize("auto_class", AUTO_CLASSES)


@dataclass
class LoadedCheckpoints:
    """The report of a child process, and the folder of its checkpoints."""

    folder: Path
    report: dict[str, Any]
    outputs: dict[str, torch.Tensor]

    def get_outputs(self, prefix: str) -> dict[str, torch.Tensor]:
        """Return the outputs under `prefix/`, without the prefix."""
        prefix += "/"
        return {
            name.removeprefix(prefix): value
            for name, value in self.outputs.items()
            if name.startswith(prefix)
        }


@pytest.fixture(scope="module")
def inputs(module_path: Path) -> Path:
    """Return a file with images and pixel values."""
    generator = torch.Generator().manual_seed(SEED)
    file = module_path / "inputs.safetensors"
    save_file(
        {
            "pixel_values": torch.rand(2, 3, 16, 24, generator=generator),
            "larger_pixel_values": torch.rand(2, 3, 24, 32, generator=generator),
            "image": torch.randint(0, 256, (3, 20, 30), generator=generator, dtype=torch.uint8),
        },
        file,
    )
    return file


def build_random_model(name: str) -> Any:
    """Return the model of a checkpoint, with reproducible random weights."""
    model_class, overrides = CHECKPOINTS[name]
    return randomize(model_class(vitcls.ViTCLSConfig(**SIZES, **overrides)))


@pytest.fixture(scope="module")
def saved(module_path: Path) -> Path:
    """Return a folder with all checkpoints."""
    processor = vitcls.ViTCLSImageProcessor(size={"height": 16, "width": 24})
    for name in CHECKPOINTS:
        save_both(build_random_model(name), module_path / name, processor)
    return module_path


@pytest.fixture(scope="module")
def package(saved: Path, inputs: Path, module_path: Path) -> LoadedCheckpoints:
    """Load the checkpoints with the classes of the package."""
    main(str(inputs), module_path / "package", torch.get_num_threads(), list_sources(saved))
    return read_answers(module_path / "package")


@pytest.fixture(scope="module")
def first(saved: Path, inputs: Path, module_path: Path) -> LoadedCheckpoints:
    """Load the checkpoints in a process without the package."""
    return load_in_child(saved, inputs, module_path / "first")


@pytest.fixture(scope="module")
def second(first: LoadedCheckpoints, inputs: Path, module_path: Path) -> LoadedCheckpoints:
    """Load the checkpoints that the first process saved in another process."""
    return load_in_child(first.folder, inputs, module_path / "second")


@pytest.fixture(params=GENERATIONS)
def child(request: pytest.FixtureRequest) -> LoadedCheckpoints:
    """Return the outputs of the first process, and those of the second one."""
    return request.getfixturevalue(request.param)


def load_in_child(saved: Path, inputs: Path, target: Path) -> LoadedCheckpoints:
    """Run load_without_package.py in a separate process with an empty cache."""
    target.mkdir()
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("HF_", "TRANSFORMERS_"))
    }
    environment |= {"HF_HOME": str(target / "home"), "HF_HUB_OFFLINE": "1"}
    words = ["-I", CHILD, inputs, target, torch.get_num_threads(), *list_sources(saved)]
    run_python(*words, environment=environment, cwd=target)
    return read_answers(target)


def list_sources(folder: Path) -> list[str]:
    return [str(folder / name) for name in CHECKPOINTS]


def read_answers(target: Path) -> LoadedCheckpoints:
    report = read_json(target / "report.json")
    return LoadedCheckpoints(target, report, load_file(target / "answers.safetensors"))


@each_checkpoint
@each_auto_class
def test_every_auto_class_loads_every_checkpoint_without_the_package(
    child: LoadedCheckpoints, package: LoadedCheckpoints, name: str, auto_class: str, saved: Path
) -> None:
    found = child.report[name][auto_class]
    wanted = package.report[name][auto_class]
    assert found["module"].startswith("transformers_modules.")
    assert wanted["module"] == "modeling_vitcls.model.modeling_vitcls"
    assert found["class"] == wanted["class"]
    assert found["missing"] == wanted["missing"]
    missing = {key.removeprefix("vitcls.") for key in found["missing"]}
    stored = {key.removeprefix("vitcls.") for key in load_file(saved / name / "model.safetensors")}
    assert not missing & stored
    assert not (found["class"] == CHECKPOINTS[name][0].__name__ and missing)
    prefix = f"{name}/{auto_class}"
    assert_same_bits(child.get_outputs(prefix), package.get_outputs(prefix))


@each_checkpoint
def test_a_checkpoint_is_saved_and_adapted_without_the_package(
    child: LoadedCheckpoints, package: LoadedCheckpoints, name: str, inputs: Path
) -> None:
    wanted = compute_outputs(build_random_model(name), load_file(inputs)["pixel_values"])
    # Not equal to the bit: weights of a memory-mapped file are aligned differently, and kernels
    # depend on alignment.
    assert_close(child.get_outputs(f"{name}/again"), wanted, rtol=1e-5, atol=1e-6)
    assert_same_bits(child.get_outputs(f"{name}/larger"), package.get_outputs(f"{name}/larger"))


@each_checkpoint
def test_configuration_and_image_processor_load_without_the_package(
    child: LoadedCheckpoints, package: LoadedCheckpoints, name: str
) -> None:
    found = child.report[name]
    assert found["AutoConfig"]["class"] == "ViTCLSConfig"
    assert found["AutoConfig"]["module"].startswith("transformers_modules.")
    assert found["AutoImageProcessor"] == {
        "None": "ViTCLSImageProcessor",
        "torchvision": "ViTCLSImageProcessor",
        "pil": "ViTCLSImageProcessorPil",
    }
    prefix = f"{name}/processor"
    assert_same_bits(child.get_outputs(prefix), package.get_outputs(prefix))


@each_checkpoint
def test_saving_with_and_without_the_package_writes_all_code_and_no_pickle(
    child: LoadedCheckpoints, name: str, saved: Path
) -> None:
    code = {file.name for file in SHIPPED_FILES}
    names = code | {"config.json", "model.safetensors", "preprocessor_config.json"}
    folder = child.folder / name
    for each in (saved / name, folder):
        assert get_file_names(each) == names
        for file in SHIPPED_FILES:
            assert (each / file.name).read_bytes() == file.read_bytes()
    assert read_json(folder / "config.json") == read_json(saved / name / "config.json")

    settings = read_json(folder / "preprocessor_config.json")
    assert settings["auto_map"] == read_json(saved / name / "preprocessor_config.json")["auto_map"]


def test_code_from_the_hub_alone_refuses_another_vit(first: LoadedCheckpoints) -> None:
    """The model would have random weights."""
    error = first.report["another ViT"]
    assert f"{first.folder / 'vit'} is a checkpoint of another project" in error
    assert "`pip install modeling_vitcls`" in error
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize("file", SHIPPED_FILES, ids=lambda file: file.name)
def test_shipped_files_import_only_what_the_hub_can_load(file: Path) -> None:
    """Check libraries and siblings by name; transformers finds the same ones as Python."""
    assert set(get_imports(file)) <= ALLOWED_LIBRARIES

    nodes = list(ast.walk(ast.parse(file.read_text())))
    relative = [node for node in nodes if isinstance(node, ast.ImportFrom) and node.level > 0]

    assert all(node.level == 1 and node.module for node in relative), (
        "only `from .x_vitcls import Y` works"
    )

    siblings = {node.module for node in relative} | set(
        filter(None, map(get_module_imported_by_name, nodes))
    )
    shipped = {shipped.stem for shipped in SHIPPED_FILES}

    if (
        file.stem == "configuration_vitcls"
    ):  # a string lists all other files, so that transformers copies them
        assert siblings <= shipped
        assert set(get_relative_imports(file)) == shipped - {file.stem}
    else:
        assert siblings == set(get_relative_imports(file))
        assert siblings <= shipped


def test_two_shipped_files_open_files_or_addresses_and_none_starts_a_program() -> None:
    """SECURITY.md names the two, which a person reads first."""
    opening: set[str] = set()
    for file in SHIPPED_FILES:
        tree = ast.parse(file.read_text())
        calls = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
        methods = {name.rpartition(".")[2] for name in calls}
        assert not calls & {"eval", "exec", "compile", "__import__"}
        assert not methods & {"system", "popen", "Popen", "run", "write_text", "write_bytes"}
        assert not set(get_imports(file)) & {"ctypes", "pickle", "shutil", "socket", "subprocess"}
        if methods & {"open", "urlopen", "get_session", "read_text", "read_bytes"}:
            opening.add(file.name)
    assert opening == {"field_checks_vitcls.py", "image_processing_vitcls.py"}
    assert all(f"`{name}`" in (ROOT / "SECURITY.md").read_text() for name in opening)


def get_module_imported_by_name(node: ast.AST) -> str | None:
    """Return `x_vitcls` for `importlib.import_module(".x_vitcls", __package__)`, or None."""
    if not isinstance(node, ast.Call) or ast.unparse(node.func) != "importlib.import_module":
        return None
    name, package = node.args
    assert isinstance(name, ast.Constant)
    assert name.value.startswith(".")
    assert ast.unparse(package) == "__package__"
    return name.value.removeprefix(".")
