"""Checkpoints with their own code, loaded in processes that cannot import this package.

The child processes run load_without_package.py. One loads the checkpoints of this process and saves
them, the next loads those. Their outputs must equal the outputs of this process, to the bit.
"""

import ast
import json
import os
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.fresh_processes import run_python
from helpers.load_without_package import AUTO_CLASSES, BACKENDS, SEED, compute_outputs
from safetensors.torch import load_file, save_file
from transformers.dynamic_module_utils import get_imports, get_relative_imports

import modeling_vitcls as vitcls


pytestmark = pytest.mark.integration


PACKAGE = Path(vitcls.__file__).parent
SHIPPED_FILES = sorted((PACKAGE / "model").glob("*_vitcls.py"))
ALLOWED_LIBRARIES = {
    "torch",
    "transformers",
    "huggingface_hub",
    "PIL",
    "numpy",
} | sys.stdlib_module_names
CHILD = Path(__file__).parents[1] / "helpers" / "load_without_package.py"

SIZES = {
    "image_size": [16, 24],
    "patch_size": 8,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}
# Name of the checkpoint -> its class and configuration fields.
CHECKPOINTS: dict[str, tuple[Any, dict[str, Any]]] = {
    "classifier": (
        vitcls.ViTCLSForImageClassification,
        {
            "num_distillation_tokens": 1,
            "num_register_tokens": 4,
            "id2label": {0: "cat", 1: "dog", 2: "owl"},
        },
    ),
    "model": (
        vitcls.ViTCLSModel,
        {"num_cls_tokens": 0, "num_register_tokens": 2, "pooling": "attention"},
    ),
    "mim": (
        vitcls.ViTCLSForMaskedImageModeling,
        {"position_embedding_type": "rope_2d", "mlp_type": "swiglu"},
    ),
    "backbone": (vitcls.ViTCLSBackbone, {"out_features": ["stage1", "stage2"]}),
    "multitask": (
        vitcls.ViTCLSForMultiTaskClassification,
        {"num_cls_tokens": 2, "tasks": {"species": ["cat", "dog", "owl"], "age": 2}},
    ),
}
AUTO_TO_CLASS: dict[str, Any] = {
    "AutoModel": vitcls.ViTCLSModel,
    "AutoModelForImageClassification": vitcls.ViTCLSForImageClassification,
    "AutoModelForMaskedImageModeling": vitcls.ViTCLSForMaskedImageModeling,
    "AutoBackbone": vitcls.ViTCLSBackbone,
}
PROCESSORS: dict[str | None, Any] = {
    None: vitcls.ViTCLSImageProcessor,
    "torchvision": vitcls.ViTCLSImageProcessor,
    "pil": vitcls.ViTCLSImageProcessorPil,
}
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
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a file with images and pixel values."""
    generator = torch.Generator().manual_seed(SEED)
    file = tmp_path_factory.mktemp("inputs") / "inputs.safetensors"
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
    model = model_class(vitcls.ViTCLSConfig(**SIZES, **overrides))
    torch.manual_seed(SEED)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with all checkpoints."""
    folder = tmp_path_factory.mktemp("saved")
    for name in CHECKPOINTS:
        build_random_model(name).save_pretrained(folder / name)
        vitcls.ViTCLSImageProcessor(size={"height": 16, "width": 24}).save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="module")
def first(saved: Path, inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> LoadedCheckpoints:
    """Load the checkpoints in a process without the package."""
    return load_in_child(
        [str(saved / name) for name in CHECKPOINTS], inputs, tmp_path_factory, HF_HUB_OFFLINE="1"
    )


@pytest.fixture(scope="module")
def second(
    first: LoadedCheckpoints, inputs: Path, tmp_path_factory: pytest.TempPathFactory
) -> LoadedCheckpoints:
    """Load the checkpoints that the first process saved in another process."""
    sources = [str(first.folder / name) for name in CHECKPOINTS]
    return load_in_child(sources, inputs, tmp_path_factory, HF_HUB_OFFLINE="1")


@pytest.fixture(params=GENERATIONS)
def child(request: pytest.FixtureRequest) -> LoadedCheckpoints:
    """Return the outputs of the first process, and those of the second one."""
    return request.getfixturevalue(request.param)


def load_in_child(
    sources: list[str], inputs: Path, folders: pytest.TempPathFactory, **settings: str
) -> LoadedCheckpoints:
    """Run load_without_package.py in a separate process with an empty cache."""
    home = folders.mktemp("home")
    target = folders.mktemp("target")
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("HF_", "TRANSFORMERS_"))
    }
    environment |= {"HF_HOME": str(home), "NO_PROXY": "127.0.0.1,localhost", **settings}
    words = ["-I", CHILD, inputs, target, torch.get_num_threads(), *sources]
    run_python(*words, environment=environment, cwd=home)
    report = json.loads((target / "report.json").read_text())
    return LoadedCheckpoints(target, report, load_file(target / "answers.safetensors"))


def get_expected_class(name: str, auto_class: str) -> Any:
    """Return the class that an Auto class loads for a checkpoint."""
    if (name, auto_class) == ("multitask", "AutoModelForImageClassification"):
        return vitcls.ViTCLSForMultiTaskClassification
    return AUTO_TO_CLASS[auto_class]


assert_same = partial(torch.testing.assert_close, rtol=0, atol=0)  # names, and values to the bit


@each_checkpoint
@each_auto_class
def test_every_auto_class_loads_every_checkpoint_without_the_package(
    child: LoadedCheckpoints, name: str, auto_class: str, saved: Path, inputs: Path
) -> None:
    model_class = get_expected_class(name, auto_class)
    torch.manual_seed(SEED)
    model, loading = model_class.from_pretrained(saved / name, output_loading_info=True)

    report = child.report[name][auto_class]
    assert report["class"] == model_class.__name__
    assert report["module"].startswith("transformers_modules.")
    assert report["missing"] == sorted(loading["missing_keys"])
    stored = {key.removeprefix("vitcls.") for key in load_file(saved / name / "model.safetensors")}
    assert not {key.removeprefix("vitcls.") for key in loading["missing_keys"]} & stored
    assert not (model_class is CHECKPOINTS[name][0] and loading["missing_keys"])
    assert_same(
        child.get_outputs(f"{name}/{auto_class}"),
        compute_outputs(model, load_file(inputs)["pixel_values"]),
    )


@each_checkpoint
def test_a_checkpoint_is_saved_and_adapted_without_the_package(
    child: LoadedCheckpoints, name: str, saved: Path, inputs: Path
) -> None:
    wanted = compute_outputs(build_random_model(name), load_file(inputs)["pixel_values"])
    # Not equal to the bit: weights of a memory-mapped file are aligned differently, and kernels
    # depend on alignment.
    torch.testing.assert_close(child.get_outputs(f"{name}/again"), wanted, rtol=1e-5, atol=1e-6)
    model = vitcls.ViTCLSModel.from_pretrained(saved / name, image_size=[24, 32])
    assert_same(
        child.get_outputs(f"{name}/larger"),
        compute_outputs(model, load_file(inputs)["larger_pixel_values"]),
    )


@each_checkpoint
def test_configuration_and_image_processor_load_without_the_package(
    child: LoadedCheckpoints, name: str, inputs: Path
) -> None:
    report = child.report[name]
    assert report["AutoConfig"]["class"] == "ViTCLSConfig"
    assert report["AutoConfig"]["module"].startswith("transformers_modules.")
    image = load_file(inputs)["image"]
    for backend in BACKENDS:
        processor_class = PROCESSORS[backend]
        assert report["AutoImageProcessor"][str(backend)] == processor_class.__name__
        pixel_values = processor_class(size={"height": 16, "width": 24})(
            image, return_tensors="pt"
        )["pixel_values"]
        assert torch.equal(child.outputs[f"{name}/processor/{backend}"], pixel_values)


@torch.no_grad()
def test_the_classification_pipeline_loads_without_the_package(
    child: LoadedCheckpoints, saved: Path, inputs: Path
) -> None:
    model = vitcls.ViTCLSForImageClassification.from_pretrained(saved / "classifier").eval()
    processor = vitcls.ViTCLSImageProcessor.from_pretrained(saved / "classifier")
    logits = model(**processor(load_file(inputs)["image"], return_tensors="pt")).logits
    scores = {
        model.config.id2label[index]: score
        for index, score in enumerate(logits.softmax(-1)[0].tolist())
    }
    found = {entry["label"]: entry["score"] for entry in child.report["classifier"]["pipeline"]}
    assert found == pytest.approx(scores, abs=1e-6)


@each_checkpoint
def test_a_checkpoint_contains_all_its_code_and_no_pickle(name: str, saved: Path) -> None:
    code = {file.name for file in SHIPPED_FILES}
    assert {file.name for file in (saved / name).iterdir()} == code | {
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
    }
    for file in SHIPPED_FILES:
        assert (saved / name / file.name).read_bytes() == file.read_bytes()


@each_checkpoint
def test_saving_without_the_package_writes_the_same_files(
    child: LoadedCheckpoints, name: str, saved: Path
) -> None:
    folder = child.folder / name
    assert {file.name for file in folder.iterdir()} == {
        file.name for file in (saved / name).iterdir()
    }
    for file in SHIPPED_FILES:
        assert (folder / file.name).read_bytes() == file.read_bytes()
    assert json.loads((folder / "config.json").read_text()) == json.loads(
        (saved / name / "config.json").read_text()
    )

    settings = json.loads((folder / "preprocessor_config.json").read_text())
    assert (
        settings["auto_map"]
        == json.loads((saved / name / "preprocessor_config.json").read_text())["auto_map"]
    )


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


def get_module_imported_by_name(node: ast.AST) -> str | None:
    """Return `x_vitcls` for `importlib.import_module(".x_vitcls", __package__)`, or None."""
    if not isinstance(node, ast.Call) or ast.unparse(node.func) != "importlib.import_module":
        return None
    name, package = node.args
    assert isinstance(name, ast.Constant)
    assert name.value.startswith(".")
    assert ast.unparse(package) == "__package__"
    return name.value.removeprefix(".")
