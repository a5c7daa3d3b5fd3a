"""Run tests and benchmarks on a CUDA device, and write docs/speed-gpu.md (`make gpu`).

    python scripts/gpu.py                                                   all parts, about 30 minutes
    python scripts/gpu.py --parts training fsdp2 --output training.md       some parts, each under 10 minutes

The file is written after each row. If a row or part fails, the file contains the error, the remaining rows and parts
are still run, and the exit status is 1. Without a CUDA device, the script prints a message and exits with status 0.

`make gpu` installs packages first. On a machine without internet access, run the script with a Python that has the
packages, from the root of the repository: PYTHONPATH=. python3 scripts/gpu.py
"""

import argparse
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import benchmark
from torch.utils.flop_counter import FlopCounterMode

from modeling_vitcls import ViTCLSConfig, ViTCLSForImageClassification
from modeling_vitcls.benchmarking.comparison import BenchmarkSettings, measure_throughput
from modeling_vitcls.benchmarking.peers import build_random_images
from modeling_vitcls.benchmarking.tables import format_markdown, print_comparison
from modeling_vitcls.benchmarking.work import WORKLOADS, run_benchmarks
from modeling_vitcls.files import read_json


Lines = Iterator[str]  # lines of the Markdown page
REPOSITORY = Path(__file__).parents[1]
OUTPUT = REPOSITORY / "docs" / "speed-gpu.md"
FAILURE_PREFIX = "failed: "  # prefix of the error message for a failed row or part
FSDP2_SETTINGS = REPOSITORY / "scripts" / "accelerate" / "fsdp2.yaml"
TEST_ARGUMENTS = ("tests/core", "tests/training/test_mfu.py", "tests/benchmarking/test_growth.py", "-m", "not slow")
PARALLEL_TEST_ARGUMENTS = ("-n", "4", "--dist", "loadfile")
BENCHMARKS = ("inference", "growth", "step", "inexact")
NUM_PAIRS = 5  # number of measurement pairs per comparison
FSDP2_TIMEOUT = 300  # timeout of the run with sharded weights, in seconds
BATCH_SIZE = 64
# With CUDA graphs, the first call runs without a graph, the second call records a graph, and later calls replay it.
NUM_WARM_UP_CALLS = 3
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Modes of torch.compile, keyed by name. max-autotune uses CUDA graphs.
COMPILE_MODES = {"eager": None, "compiled": "default", "compiled, max-autotune": "max-autotune"}
AUTOTUNED_PRECISION = "bf16"  # other precisions are not autotuned, because autotuning takes a minute or more
FLASH_MODE = "eager, flash attention"  # half precision only; raises an error if flash attention is not available
# Maximum difference from the fp32 logits on the CPU, relative to the largest logit.
MAX_DIFFERENCES = {"fp32": 1e-3, "bf16": 0.05, "fp16": 0.02}
NUM_REGISTERS = {"197 tokens": 0, "200 tokens": 3}


def main() -> None:
    """Run the selected parts, and exit with status 1 if a row or part failed."""
    parser = argparse.ArgumentParser(description="Run tests and benchmarks on a CUDA device.")
    parser.add_argument("--parts", nargs="+", choices=tuple(PARTS), default=tuple(PARTS))
    parser.add_argument("--output", type=Path, default=OUTPUT, help="Markdown file; default: docs/speed-gpu.md")
    flags = parser.parse_args()
    if not torch.cuda.is_available():
        print("PyTorch found no CUDA device: no tests or benchmarks were run")
        return
    lines = [
        f"# Speed on {torch.cuda.get_device_name()}",
        "",
        "Written by `make gpu`. "
        f"ViT-S/16 at 224 x 224 pixels, PyTorch {torch.__version__}, CUDA {torch.version.cuda}.",
    ]
    for name in flags.parts:
        for line in run_part(name):
            print(line, flush=True)
            lines.append(line)
            flags.output.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")
    print(f"written to {flags.output}")
    raise SystemExit(int(any(FAILURE_PREFIX in line for line in lines)))


def run_part(name: str) -> Lines:
    """Yield the lines of one part of the page. If the part fails, the last line contains the error."""
    title, yield_lines = PARTS[name]
    yield from ("", f"## {title}", "")
    try:
        yield from yield_lines()
    except Exception as error:
        yield from ("", describe_failure(error))  # the empty line ends an unfinished table


def describe_failure(error: Exception) -> str:
    """Print the traceback of an exception, and return one line without vertical bars."""
    traceback.print_exception(error)
    message = next(iter(str(error).splitlines()), "")
    if isinstance(error, subprocess.SubprocessError):
        message = "see the output"  # the error message contains local paths
    return f"{FAILURE_PREFIX}{type(error).__name__}: {message[:200]}".replace("|", "/")


def run_tests() -> Lines:
    """Run the tests, and yield one line with the result. The output of the tests is printed."""
    command = [sys.executable, "-m", "pytest", "-q", *PARALLEL_TEST_ARGUMENTS, *TEST_ARGUMENTS]
    # One thread per test process, as in the Makefile.
    subprocess.run(command, cwd=REPOSITORY, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True)
    yield f"passed: `pytest {' '.join(TEST_ARGUMENTS[:-1])} '{TEST_ARGUMENTS[-1]}'`"


def compare_models(work_kind: str) -> Lines:
    """Yield one line for each failed row, and a table that compares the speed with that of other models."""
    settings = BenchmarkSettings(("transformers", "timm"), NUM_PAIRS, device="cuda")
    comparisons = []
    for row in WORKLOADS[work_kind].rows:
        try:
            for comparison in run_benchmarks((work_kind,), (row,), settings):
                comparisons.append(print_comparison(comparison))
        except Exception as error:
            yield from (f"{row}: {describe_failure(error)}", "")
    if comparisons:
        yield format_markdown(comparisons).rstrip()


def build_model(num_registers: int) -> ViTCLSForImageClassification:
    """Build ViT-S/16 with the same random weights in every call."""
    torch.manual_seed(0)
    config = ViTCLSConfig.from_preset("small", num_register_tokens=num_registers, num_labels=1000)
    return ViTCLSForImageClassification(config)


def measure_forward_passes(device: str = "cuda") -> Lines:
    """Yield a table with a row for each precision, mode and number of tokens."""
    yield from format_header("precision", "mode", "tokens", "images/s", "difference")
    for tokens, num_registers in NUM_REGISTERS.items():
        model = build_model(num_registers).eval()
        images = build_random_images(BATCH_SIZE, model.config.image_size)
        with torch.inference_mode():
            expected_logits = model(images[:2]).logits
        for precision, dtype in DTYPES.items():
            modes = COMPILE_MODES if precision == "fp32" else COMPILE_MODES | {FLASH_MODE: None}
            for mode, compile_mode in modes.items():
                if compile_mode == "max-autotune" and precision != AUTOTUNED_PRECISION:
                    continue
                try:
                    predict = compile_model(build_model(num_registers).eval().to(device, dtype), compile_mode)
                    forward = torch.inference_mode()(partial(predict, images.to(device, dtype)))
                    throughput, difference = measure_forward_pass(
                        forward, mode, expected_logits, MAX_DIFFERENCES[precision]
                    )
                    cells = f"{throughput:,.0f}", f"{difference:.1e}"
                except Exception as error:
                    cells = describe_failure(error), ""
                yield format_row(precision, mode, tokens, *cells)


def measure_forward_pass(
    forward: Callable[[], Any], mode: str, expected_logits: torch.Tensor, max_difference: float
) -> tuple[float, float]:
    """Return the throughput in images per second, and the relative difference of the logits from the expected logits.

    Raises:
        ValueError: If the logits differ by more than `max_difference` from fp32 logits computed on the CPU.
    """
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION) if mode == FLASH_MODE else nullcontext():
        for _ in range(NUM_WARM_UP_CALLS):
            logits = forward().logits[:2].float().cpu()
        difference = ((logits - expected_logits).abs().max() / expected_logits.abs().max()).item()
        if not difference <= max_difference:
            raise ValueError(f"the logits differ from the CPU logits by {difference:.1e}")
        return measure_throughput(forward, BATCH_SIZE), difference


def measure_training_steps(device: str = "cuda") -> Lines:
    """Yield a table with the model FLOPs utilization (MFU) of a training step for each mode and number of tokens."""
    yield from format_header("mode", "tokens", "images/s", "MFU")
    matrix = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)
    timer = benchmark.Timer("matrix @ matrix", globals={"matrix": matrix})
    peak_flops_per_second = 2 * 8192**3 / min(timer.blocked_autorange(min_run_time=0.25).times)
    for tokens, num_registers in NUM_REGISTERS.items():
        for mode, compile_mode in COMPILE_MODES.items():
            try:
                throughput, flops = measure_training_step(device, num_registers, compile_mode)
                cells = f"{throughput:,.0f}", f"{throughput * flops / peak_flops_per_second:.0%}"
            except Exception as error:
                cells = describe_failure(error), ""
            yield format_row(mode, tokens, *cells)


def measure_training_step(device: str, num_registers: int, compile_mode: str | None) -> tuple[float, int]:
    """Return the throughput of training steps in images per second, and the FLOPs per image."""
    model = build_model(num_registers).to(device).train()
    pixel_values = build_random_images(BATCH_SIZE, model.config.image_size).to(device)
    labels = torch.arange(BATCH_SIZE, device=device) % model.config.num_labels
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    forward: Callable = model  # the counter below does not see the operations of compiled code

    def step() -> None:
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            loss = nn.functional.cross_entropy(forward(pixel_values).logits, labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    with FlopCounterMode(display=False) as counter:
        step()
    forward = compile_model(model, compile_mode)
    for _ in range(NUM_WARM_UP_CALLS):
        step()
    return measure_throughput(step, BATCH_SIZE), counter.get_total_flops() // BATCH_SIZE


def run_fsdp2(config_file: Path = FSDP2_SETTINGS, num_processes: int | None = None) -> Lines:
    """Train a small model with sharded weights, and yield one sentence that states the loss.

    By default, each GPU has one process. The output of the run is printed.

    Raises:
        SubprocessError: If the run fails, or takes longer than `FSDP2_TIMEOUT` seconds.
    """
    num_processes = num_processes or torch.cuda.device_count()
    with tempfile.TemporaryDirectory() as folder:
        launch_flags = ["--config_file", config_file, "--num_processes", num_processes]
        training_flags = ["--output-dir", folder, *"--config digits --max-steps 10 --no-report --overwrite".split()]
        launch_command = [sys.executable, "-m", "accelerate.commands.launch", *launch_flags]
        command = [*launch_command, "-m", "modeling_vitcls.cli", "finetune", *training_flags]
        subprocess.run(list(map(str, command)), cwd=REPOSITORY, check=True, timeout=FSDP2_TIMEOUT)
        results = read_json(Path(folder, "results.json"))
    device, loss = results["device"], results["loss"]
    yield f"{results['steps']} steps with {num_processes} process(es) on {device}: loss {loss:.3f}"


def compile_model(model: nn.Module, mode: str | None) -> Callable:
    """Return the model, compiled with torch.compile unless `mode` is None."""
    torch.compiler.reset()
    return model if mode is None else torch.compile(model, mode=mode)


def format_header(*names: str) -> Lines:
    """Yield the first two lines of a Markdown table."""
    yield from (format_row(*names), format_row(*["---"] * len(names)))


def format_row(*cells: str) -> str:
    """Return a line of a Markdown table."""
    return f"| {' | '.join(cells)} |"


# Heading of each part, and function that yields its lines. Tests run last, because they write no measurements.
PARTS: dict[str, tuple[str, Callable[[], Lines]]] = {
    "forward": (f"Forward passes, batch {BATCH_SIZE}", measure_forward_passes),
    "training": (f"Training steps, batch {BATCH_SIZE}, bf16 autocast, fused AdamW", measure_training_steps),
    "fsdp2": ("Sharded training (FSDP2)", run_fsdp2),
    **{name: (f"`vitcls benchmark --work {name}`", partial(compare_models, name)) for name in BENCHMARKS},
    "tests": ("Tests", run_tests),
}


if __name__ == "__main__":
    main()
