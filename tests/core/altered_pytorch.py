"""Load a checkpoint with its own code after an alteration of PyTorch, and compare the results."""

import os
from pathlib import Path
from typing import Any

import torch
from helpers.fresh_processes import run_fresh
from helpers.tiny_models import build_tiny_config, randomize

from modeling_vitcls import ViTCLSForImageClassification

from .compare import Tensors, assert_as_exact_in_half_precision, assert_equal_in_float32


CHILD = Path(__file__).with_name("load_with_altered_pytorch.py")
FIELDS: dict[str, Any] = {"num_register_tokens": 2, "num_distillation_tokens": 1}

Results = dict[str, dict[str, Any]]


def load_with_altered_pytorch(folder: Path, alterations: list[str]) -> Results:
    """Return alteration -> results (load_with_altered_pytorch.py); "none" and "kernels_off" are added."""
    randomize(ViTCLSForImageClassification(build_tiny_config(**FIELDS))).save_pretrained(folder / "checkpoint")
    alterations = ["none", "kernels_off", *alterations]
    environment = {name: value for name, value in os.environ.items() if name != "VITCLS_CPU_KERNELS"}
    environment |= {"HF_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    ran = run_fresh("-I", CHILD, folder / "checkpoint", folder, *alterations, environment=environment, cwd=folder)
    assert ran.returncode == 0, ran.stderr[-4000:]
    return {alteration: read_results(folder, alteration) for alteration in alterations}


def read_results(folder: Path, alteration: str) -> dict[str, Any]:
    """Return the results of an alteration.

    After an error, they contain only the traceback, as "torch_error" or "error".
    """
    results: dict[str, Any] = {"torch_error": (folder / f"{alteration}.torch_error").read_text(), "error": ""}
    if results["torch_error"]:
        return results
    results["error"] = (folder / f"{alteration}.error").read_text()
    return results if results["error"] else results | torch.load(folder / f"{alteration}.pt")


def assert_same_results(results: dict[str, Any], plain: dict[str, Any]) -> None:
    """Check that inference and a training step equal plain PyTorch, in float32 and bfloat16."""
    assert not results["torch_error"], results["torch_error"]
    assert not results["error"], results["error"]
    assert results["module"].startswith("transformers_modules."), results["module"]
    exact = select_tensors(plain, torch.float32)
    assert_equal_in_float32(select_tensors(results, torch.float32), exact)
    found, expected = (select_tensors(each, torch.bfloat16) for each in (results, plain))
    assert_as_exact_in_half_precision(found, expected, exact)


def select_tensors(results: dict[str, Any], dtype: torch.dtype) -> Tensors:
    """Return the tensors of the model with this dtype."""
    prefix = f"{dtype}/"
    tensors = {name: value for name, value in results.items() if isinstance(value, torch.Tensor)}
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
