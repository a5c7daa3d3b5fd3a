"""Run tests and benchmarks on a CUDA device, and write docs/speed-gpu.md (`make gpu`).

Without a CUDA device, the script prints a message and exits with status 0.
"""

import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from modeling_vitcls import ViTCLSConfig, ViTCLSForImageClassification
from modeling_vitcls.benchmarking.comparison import BenchmarkSettings, measure_throughput
from modeling_vitcls.benchmarking.peers import build_random_images
from modeling_vitcls.benchmarking.tables import format_markdown, print_comparison
from modeling_vitcls.benchmarking.work import compare
from modeling_vitcls.files import read_json
from modeling_vitcls.system import measure_gemm_peak
from modeling_vitcls.training.mfu import count_training_flops


Rows = Iterator[tuple[str, ...]]
REPOSITORY = Path(__file__).parents[1]
OUTPUT = REPOSITORY / "docs" / "speed-gpu.md"
TESTS = ("tests/core", "tests/training/test_mfu.py", "tests/benchmarking/test_growth.py", "-m", "not slow")
BENCHMARKS = ("inference", "growth", "step", "inexact")
BATCH_SIZE = 64
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Name -> mode of torch.compile; max-autotune uses CUDA graphs.
COMPILE_MODES = {"eager": None, "compiled": "default", "compiled, max-autotune": "max-autotune"}
FLASH_MODE = "eager, flash attention"  # an error is raised if PyTorch would use another kernel; half precision only
LIMITS = {"fp32": 1e-3, "bf16": 0.05, "fp16": 0.02}  # largest difference from fp32 on the CPU / largest logit
NUM_REGISTERS = {"197 tokens": 0, "200 tokens": 3}


def main() -> None:
    """Run the tests and the benchmarks, and exit with the status of the tests."""
    if not torch.cuda.is_available():
        print("This machine has no CUDA device: no tests or benchmarks were run")
        return
    status = subprocess.run([sys.executable, "-m", "pytest", "-q", *TESTS], cwd=REPOSITORY, check=False).returncode
    settings = BenchmarkSettings(("transformers", "timm"), num_pairs=9, device="cuda")
    comparisons = [print_comparison(comparison) for comparison in compare(BENCHMARKS, (), settings)]
    sections = [
        f"# Speed on {torch.cuda.get_device_name()}",
        f"Written by `make gpu`. ViT-S/16 at 224 pixels, PyTorch {torch.__version__}, CUDA {torch.version.cuda}.",
        f"## Forward passes, batch {BATCH_SIZE}",
        format_table(("precision", "mode", "tokens", "images/s", "difference"), measure_forward_passes("cuda")),
        f"## Training steps, batch {BATCH_SIZE}, bf16 autocast, fused AdamW",
        format_table(("mode", "tokens", "images/s", "MFU"), measure_steps("cuda")),
        "## Sharded training (FSDP2)",
        run_fsdp2(REPOSITORY / "scripts" / "accelerate" / "fsdp2.yaml", torch.cuda.device_count()),
        "## Compared with transformers and timm",
        format_markdown(comparisons),
    ]
    OUTPUT.write_text("\n\n".join(sections).rstrip() + "\n", encoding="utf-8")
    print(f"written to {OUTPUT}")
    raise SystemExit(status)


def build_model(num_registers: int) -> ViTCLSForImageClassification:
    """Build ViT-S/16 with the same random weights in every call."""
    torch.manual_seed(0)
    config = ViTCLSConfig.from_preset("small", num_register_tokens=num_registers, num_labels=1000)
    return ViTCLSForImageClassification(config)


def measure_forward_passes(device: str) -> Rows:
    """Yield a row for each precision, mode and number of tokens.

    Raises:
        ValueError: If the logits differ by more than LIMITS from fp32 logits computed on the CPU.
    """
    for tokens, num_registers in NUM_REGISTERS.items():
        model = build_model(num_registers).eval()
        images = build_random_images(BATCH_SIZE, model.config.image_size)
        with torch.inference_mode():
            expected = model(images[:2]).logits
        for precision, dtype in DTYPES.items():
            pixel_values = images.to(device, dtype)
            modes = COMPILE_MODES if precision == "fp32" else COMPILE_MODES | {FLASH_MODE: None}
            for mode, compile_mode in modes.items():
                predict = compile_model(build_model(num_registers).eval().to(device, dtype), compile_mode)
                with torch.inference_mode(), select_attention(mode):
                    logits = predict(pixel_values).logits[:2].float().cpu()
                difference = ((logits - expected).abs().max() / expected.abs().max()).item()
                if not difference <= LIMITS[precision]:
                    raise ValueError(f"{precision}, {mode}: logits differ from the CPU logits by {difference:.1e}")
                with select_attention(mode):
                    speed = measure_throughput(torch.inference_mode()(partial(predict, pixel_values)), BATCH_SIZE)
                yield precision, mode, tokens, f"{speed:,.0f}", f"{difference:.1e}"


def measure_steps(device: str) -> Rows:
    """Yield a row with the model FLOPs utilization (MFU) of a training step for each mode and number of tokens."""
    peak = measure_gemm_peak(device, torch.bfloat16)
    for tokens, num_registers in NUM_REGISTERS.items():
        for mode, compile_mode in COMPILE_MODES.items():
            model = build_model(num_registers).to(device).train()
            pixel_values = build_random_images(BATCH_SIZE, model.config.image_size).to(device)
            labels = torch.arange(BATCH_SIZE, device=device) % model.config.num_labels
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
            forward = compile_model(model, compile_mode)

            def step(forward=forward, pixel_values=pixel_values, labels=labels, optimizer=optimizer) -> None:
                with torch.autocast(torch.device(device).type, torch.bfloat16):
                    loss = nn.functional.cross_entropy(forward(pixel_values).logits, labels)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()

            speed = measure_throughput(step, BATCH_SIZE)
            yield mode, tokens, f"{speed:,.0f}", f"{speed * count_training_flops(model) / peak:.0%}"


def select_attention(mode: str) -> AbstractContextManager:
    """Return a context that allows only the flash attention kernel if the mode is FLASH_MODE."""
    return sdpa_kernel(SDPBackend.FLASH_ATTENTION) if mode == FLASH_MODE else nullcontext()


def run_fsdp2(settings: Path, num_processes: int) -> str:
    """Train a small model with sharded weights, and return one sentence with the loss.

    Raises:
        subprocess.CalledProcessError: If the run fails. Its output was printed.
    """
    with tempfile.TemporaryDirectory() as folder:
        launch = ["-m", "accelerate.commands.launch", "--config_file", settings, "--num_processes", num_processes]
        flags = ["--config", "digits", "--max-steps", 10, "--no-report", "--output-dir", folder, "--overwrite"]
        command = [sys.executable, *launch, "-m", "modeling_vitcls.cli", "finetune", *flags]
        subprocess.run(list(map(str, command)), cwd=REPOSITORY, check=True)
        results = read_json(Path(folder, "results.json"))
    return (
        f"{results['steps']} steps with {num_processes} process(es) on {results['device']}: loss {results['loss']:.3f}"
    )


def compile_model(model: nn.Module, mode: str | None) -> Callable:
    """Return the model; if `mode` is set, compiled in this mode."""
    torch.compiler.reset()
    return model if mode is None else torch.compile(model, mode=mode)


def format_table(header: tuple, rows: Rows) -> str:
    """Return a Markdown table."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, ("---",) * len(header), *rows))


if __name__ == "__main__":
    main()
