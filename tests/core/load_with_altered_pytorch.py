"""Load a checkpoint with its own code, without this package, after an alteration of PyTorch. Start in a new process
with:

    python -I load_with_altered_pytorch.py CHECKPOINT TARGET ALTERATION...

Each alteration is applied in a fork of this process, which has imported torch and transformers, but not this package:

    none                 nothing is altered
    kernels_off          VITCLS_CPU_KERNELS=0
    unknown_cpu          the name of the processor's capability is unknown
    operator_raises      oneDNN's linear operator raises an error
    operator_is_wrong    oneDNN's linear operator returns wrong numbers
    torch.a._b           this name is deleted

TARGET/ALTERATION.pt contains the results of inference and of one training step. After an error, the traceback is in
TARGET/ALTERATION.torch_error (a plain nn.Linear failed) or TARGET/ALTERATION.error (the checkpoint failed).
"""

import multiprocessing
import operator
import os
import sys
import traceback
from collections.abc import Callable
from functools import reduce
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch.profiler import profile
from transformers import AutoModelForImageClassification, ViTConfig, ViTForImageClassification


LABELS = torch.tensor([0, 2])
DTYPES = (torch.float32, torch.bfloat16)
SECONDS = 120


def main(checkpoint: str, target: Path, alterations: list[str]) -> None:
    """Apply each alteration in a fork."""
    import_lazy_modules(target / "built_in")
    for alteration in alterations:
        process = multiprocessing.get_context("fork").Process(target=report, args=(checkpoint, target, alteration))
        process.start()
        process.join(SECONDS)
        process.kill()


def import_lazy_modules(folder: Path) -> None:
    """Load a built-in model, so that the forks do not have to import the modules that transformers loads lazily."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    ViTForImageClassification(ViTConfig(image_size=16, patch_size=8, **sizes)).save_pretrained(folder)
    AutoModelForImageClassification.from_pretrained(folder)


def report(checkpoint: str, target: Path, alteration: str) -> None:
    """Save the results of an alteration, or the traceback."""
    # replaces the thread pool, which a fork does not inherit, before several threads load weights
    torch.set_num_threads(1)
    alter(alteration)
    message = get_error(lambda: torch.nn.Linear(4, 3)(torch.ones(2, 4)).sum().backward())
    (target / f"{alteration}.torch_error").write_text(message)
    if not message:
        message = get_error(lambda: torch.save(run_model(checkpoint), target / f"{alteration}.pt"))
        (target / f"{alteration}.error").write_text(message)


def get_error(function: Callable[[], Any]) -> str:
    """Return the traceback of the exception that a function raises, or an empty string."""
    try:
        function()
    except Exception:
        return traceback.format_exc()
    return ""


def run_model(checkpoint: str) -> dict[str, Any]:
    """Return logits, loss and gradients in each dtype, operators, and the names of the modules' classes."""
    results: dict[str, Any] = {}
    for dtype in DTYPES:
        model = AutoModelForImageClassification.from_pretrained(checkpoint, trust_remote_code=True, dtype=dtype)
        lower_thresholds(model)
        pixel_values = torch.linspace(-1, 1, 2 * 3 * 32 * 32).sin().view(2, 3, 32, 32)
        with torch.no_grad(), profile() as profiled:
            results[f"{dtype}/logits"] = model.eval()(pixel_values).logits
        results[f"{dtype}/operators"] = {event.key for event in profiled.key_averages()}
        loss = model.train()(pixel_values, labels=LABELS).loss
        loss.backward()
        results[f"{dtype}/loss"] = loss.detach()
        results |= {f"{dtype}/gradient/{name}": weight.grad for name, weight in model.named_parameters()}
        torch.optim.SGD(model.parameters(), lr=0.01).step()
        with torch.no_grad():
            results[f"{dtype}/logits_after_step"] = model.eval()(pixel_values).logits
        results["classes"] = {type(module).__name__ for module in model.modules()}
        results["module"] = type(model).__module__
    return results


def lower_thresholds(model: torch.nn.Module) -> None:
    """Enable the kernels for small tensors."""
    kernels = sys.modules[type(model).__module__.rpartition(".")[0] + ".cpu_kernels_vitcls"]
    kernels.MIN_MULTIPLICATIONS.update(dict.fromkeys(kernels.MIN_MULTIPLICATIONS, 0))
    kernels.MIN_CHUNKED_SCORES = 0


def alter(alteration: str) -> None:
    """Apply an alteration to this process."""
    onednn_linear = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    if alteration == "kernels_off":
        os.environ["VITCLS_CPU_KERNELS"] = "0"
    elif alteration == "unknown_cpu":
        torch.backends.cpu.get_cpu_capability = lambda: "DEFAULT"
    elif alteration == "operator_raises":
        torch.ops.mkldnn._linear_pointwise = SimpleNamespace(default=lambda *args: operator.truediv(1, 0))
    elif alteration == "operator_is_wrong":
        torch.ops.mkldnn._linear_pointwise = SimpleNamespace(default=lambda *args: onednn_linear.default(*args) * 2)
    elif alteration != "none":
        remove(alteration)


def remove(name: str) -> None:
    """Delete a name of PyTorch, such as `torch._C._functorch`, and its modules.

    Raises:
        RuntimeError: if the name still exists.
    """
    owner_name, _, attribute = name.rpartition(".")
    owner = find(owner_name)
    if isinstance(owner, torch._ops._OpNamespace):  # torch.ops looks operators up when they are first read
        find_operator = torch._ops._OpNamespace.__getattr__
        owner.__dict__.pop(attribute, None)

        def find_other_operator(namespace: Any, operator_name: str) -> Any:
            if namespace is owner and operator_name == attribute:
                raise AttributeError(f"{name} was removed")
            return find_operator(namespace, operator_name)

        torch._ops._OpNamespace.__getattr__ = find_other_operator
    else:
        delattr(owner, attribute)
    if name == "torch.compiler._is_exporting_flag":  # PyTorch versions without it have a public function instead
        torch.compiler.is_exporting = torch.compiler.is_compiling
    for module in [module for module in sys.modules if module == name or module.startswith(f"{name}.")]:
        del sys.modules[module]
    try:
        find(name)
    except AttributeError:
        return
    raise RuntimeError(f"{name} could not be removed")


def find(name: str) -> Any:
    """Return the value of a dotted name that starts with `torch`."""
    return reduce(getattr, name.split(".")[1:], torch)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3:])
