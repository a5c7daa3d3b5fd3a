# /// script
# requires-python = ">=3.11"
# dependencies = ["modeling_vitcls[cli]"]
#
# [tool.uv.sources]
# modeling_vitcls = { path = "..", editable = true }
# ///
"""CPU time that a model takes besides its kernels, and the number of kernels, next to other ViTs.

    OMP_NUM_THREADS=1 python scripts/host_time.py
    VITCLS_CPU_KERNELS=0 OMP_NUM_THREADS=1 python scripts/host_time.py    # the plain layers

A GPU computes a small model faster than Python starts its kernels, so this time is what an image
costs there. It does not depend on the device: here, a ViT with 12 layers of 48 channels and 4
patches computes almost nothing. Packages take turns, and a ratio is the median over all rounds.
"""

import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from benchmark import FirstOutput, build_timm_vit, build_transformers_vit, take_step
from tools.random_weights import randomize_weights
from torch.utils._python_dispatch import TorchDispatchMode

from modeling_vitcls import ViTCLSConfig, ViTCLSForImageClassification, use_fast_modules
from modeling_vitcls.cli.parsing import run_script
from modeling_vitcls.runtime.flags import Options, check_minimum
from modeling_vitcls.runtime.system import get_processor_name, get_versions


CONFIG = ViTCLSConfig(
    hidden_size=48,
    num_hidden_layers=12,
    num_attention_heads=3,
    intermediate_size=192,
    image_size=8,
    patch_size=4,
    num_labels=10,
)
CALLS_PER_ROUND = {"forward pass": 20, "training step": 5}


@dataclass(frozen=True)
class HostTimeOptions(Options):
    """Measure the CPU time that Python and the dispatcher of PyTorch take."""

    rounds: int = 41
    """Number of rounds. Each round measures each package once."""

    def check(self) -> None:
        check_minimum(self, 1, "rounds")


class KernelCounter(TorchDispatchMode):
    """Count the operators that compute something: views and allocations start no kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, operator: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        returned = operator._schema.returns
        is_view = any(each.alias_info and not each.alias_info.is_write for each in returned)
        is_allocation = operator._schema.name.startswith(("aten::empty", "aten::new_empty"))
        name = operator._schema.name
        self.count += not (is_view or is_allocation or name == "aten::_unsafe_view")
        return operator(*args, **(kwargs or {}))


def count_kernels(function: Callable[[], object]) -> int:
    """Count the kernels that a call starts."""
    with KernelCounter() as counter:
        function()
    return counter.count


def measure_milliseconds(function: Callable[[], object], num_calls: int) -> float:
    """Measure the CPU time of a call."""
    start = time.process_time()
    for _ in range(num_calls):
        function()
    return (time.process_time() - start) / num_calls * 1000


def build_functions(work: str, images: torch.Tensor) -> dict[str, Callable[[], object]]:
    """Build one function per package that takes a forward pass or a training step."""
    models = {
        "modeling_vitcls": use_fast_modules(
            randomize_weights(ViTCLSForImageClassification(CONFIG))
        ),
        "timm": build_timm_vit(CONFIG),
        "transformers": build_transformers_vit(CONFIG),
    }
    functions: dict[str, Callable[[], object]] = {}
    for name, model in models.items():
        engine = FirstOutput(model).eval()
        if work == "forward pass":
            functions[name] = torch.no_grad()(partial(engine, images))
        else:
            optimizer = torch.optim.AdamW(engine.train().parameters(), lr=1e-5, fused=True)
            functions[name] = partial(take_step, engine, optimizer, images, nullcontext)
    return functions


def run(options: HostTimeOptions) -> None:
    """Measure, and print one table."""
    print("| work | package | ms | x modeling_vitcls | kernels |\n|---|---|---:|---|---:|")
    images = torch.randn(2, 3, *CONFIG.image_height_width)
    for work, num_calls in CALLS_PER_ROUND.items():
        functions = build_functions(work, images)
        times: dict[str, list[float]] = {name: [] for name in functions}
        for function in functions.values():
            function()  # the first call also allocates
        for index in range(options.rounds):
            # every other round in reverse order
            for name in list(functions)[:: -1 if index % 2 else 1]:
                times[name].append(measure_milliseconds(functions[name], num_calls))

        for name, function in functions.items():
            pairs = zip(times[name], times["modeling_vitcls"], strict=True)
            ratio = statistics.median(theirs / ours for theirs, ours in pairs)
            milliseconds = statistics.median(times[name])
            kernels = count_kernels(function)
            print(f"| {work} | {name} | {milliseconds:.2f} | {ratio:.2f} | {kernels} |")
    versions = ", ".join(f"{name} {version}" for name, version in get_versions("timm").items())
    threads = torch.get_num_threads()
    print(
        f"\n{get_processor_name()}, {threads} thread(s); {versions}; {time.strftime('%Y-%m-%d')}."
    )


if __name__ == "__main__":
    run_script(HostTimeOptions, run)
