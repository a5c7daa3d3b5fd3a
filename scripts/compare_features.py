"""Compare the whole job "features of a folder of photographs" with transformers' pipeline and timm.

    python scripts/compare_features.py --encoder ENCODER --photos PHOTOS --output runs/features

ENCODER is a transformers folder of a DINOv2 ViT-S/14, and PHOTOS has a folder per class. Each
program in scripts/compared/features/ starts Python, loads the model, reads the photographs and
writes their CLS tokens. The programs run in turn. The table lists the medians, and the medians of
the ratios within a round.
"""

import os
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
import tyro
from compare_tools import rename_weights
from safetensors.torch import load_file

from modeling_vitcls.runtime.system import get_processor_name


PROGRAMS = Path(__file__).parent / "compared" / "features"
NAMES = ("vitcls.sh", "pipeline.py", "timm_loader.py")


@dataclass(frozen=True)
class Options:
    """Encoder, photographs and rounds of the comparison."""

    encoder: Path
    """Folder of a DINOv2 ViT-S/14, as `AutoModel.from_pretrained` takes it."""
    photos: Path
    """Folder with CLASS/PHOTO."""
    output: Path
    """Folder for the features and the table."""
    num_photos: int = 500
    """Number of photographs."""
    rounds: int = 3
    """Number of rounds. Each round runs each program once."""


@dataclass(frozen=True)
class Usage:
    """What a program used."""

    cpu_seconds: float
    seconds: float
    peak_memory: int  # bytes of the largest process


def main() -> None:
    options = tyro.cli(Options)
    environment = prepare(options)
    lines = [
        "| precision | program | CPU seconds | seconds | peak memory, MiB | images per CPU "
        "second, vitcls / program |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for precision in ("fp32", "bf16"):
        rounds = []
        for _ in range(options.rounds):
            rounds.append({name: run_program(name, precision, environment) for name in NAMES})
            print(precision, rounds[-1], flush=True)
        for name in NAMES:
            usages = [usages_by_name[name] for usages_by_name in rounds]
            ratio = statistics.median(
                each[name].cpu_seconds / each["vitcls.sh"].cpu_seconds for each in rounds
            )
            values = [
                f"{statistics.median(usage.cpu_seconds for usage in usages):.1f}",
                f"{statistics.median(usage.seconds for usage in usages):.1f}",
                f"{statistics.median(usage.peak_memory for usage in usages) / 2**20:,.0f}",
                f"{ratio:.2f}",
            ]
            lines.append(f"| {precision} | `{name}` | {' | '.join(values)} |")
    lines += ["", f"{get_processor_name()}, {torch.get_num_threads()} threads", ""]
    (options.output / "README.md").write_text("\n".join(lines), encoding="utf-8")
    print("\n".join(lines))


def prepare(options: Options) -> dict[str, str]:
    """Link the photographs, write the weights for timm, and return the environment variables of the programs."""
    output = options.output.resolve()
    photos = output / "photos"
    shutil.rmtree(photos, ignore_errors=True)
    for file in islice(sorted(options.photos.glob("*/*")), options.num_photos):
        link = photos / file.parent.name / file.name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(file.resolve())
    weights = output / "timm.pt"
    torch.save(rename_weights(load_file(options.encoder / "model.safetensors")), weights)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {
        "ENCODER": str(options.encoder.resolve()),
        "PHOTOS": str(photos),
        "TIMM_WEIGHTS": str(weights),
        "OUTPUT": str(output / "features"),
        "PATH": path,
    }


def run_program(name: str, precision: str, environment: dict[str, str]) -> Usage:
    """Run a program, and return what it used."""
    script = PROGRAMS / name
    command = (
        ["bash", "-e", str(script)] if script.suffix == ".sh" else [sys.executable, str(script)]
    )
    variables = {**os.environ, **environment, "PRECISION": precision}
    start_time = time.perf_counter()
    process = subprocess.Popen(command, env=variables, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start_time
    if status != 0:
        raise SystemExit(f"{script} failed")
    return Usage(usage.ru_utime + usage.ru_stime, seconds, usage.ru_maxrss * 1024)


if __name__ == "__main__":
    main()
