"""Compare tools on the same encoder: accuracy, CPU time, memory, and lines of code.

    python scripts/studies/compare_tools.py --encoder ENCODER --photos PHOTOS --output runs/compared

ENCODER is a transformers folder of a DINOv2 ViT-S/14, and PHOTOS has the folders train/CLASS and
test/CLASS. Each program in scripts/studies/compared/ is what a user of the tool writes. It runs in a
process of its own, finds its inputs in environment variables, and prints its accuracy on the test
photographs. Tools that are not installed are left out. OUTPUT/README.md contains the table.
"""

import ast
import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import tyro
from photos import PhotoOptions, draw_photos, link_photos, list_photos
from safetensors.torch import load_file

from modeling_vitcls.inference.intervals import compute_proportion_interval
from modeling_vitcls.runtime.files import read_json, write_json
from modeling_vitcls.runtime.system import get_processor_name


PROGRAMS = Path(__file__).parent / "compared"
# Program -> packages whose versions are stated.
PACKAGES = {
    "vitcls.sh": ("modeling_vitcls",),
    "scikit_learn.py": ("scikit-learn", "transformers"),
    "scikit_learn_lda.py": ("scikit-learn", "transformers"),
    "transformers_trainer.py": ("transformers",),
    "timm_loop.py": ("timm",),
    "fastai_learner.py": ("fastai",),
}
# Names of timm and DINOv2 for the weights of transformers.
TIMM_NAMES = (
    (r"embeddings\.cls_token", "cls_token"),
    (r"embeddings\.position_embeddings", "pos_embed"),
    (r"embeddings\.patch_embeddings\.projection", "patch_embed.proj"),
    (r"encoder\.layer\.", "blocks."),
    (r"attention\.output\.dense", "attn.proj"),
    (r"layer_scale(\d)\.lambda1", r"ls\1.gamma"),
    (r"layernorm", "norm"),
)


@dataclass(frozen=True)
class Options(PhotoOptions):
    """Encoder, photographs and output of the comparison."""

    labels: int = 50
    """Number of training photographs per class."""
    programs: tuple[str, ...] = tuple(PACKAGES)
    """Programs in scripts/studies/compared/ to run."""


def main() -> None:
    options = tyro.cli(Options)
    options.output.mkdir(parents=True, exist_ok=True)
    chosen = draw_photos(options.photos / "train", options.labels, seed=0)
    link_photos(chosen, options.output / "photos" / "train")
    test = list_photos(options.photos / "test")
    link_photos(test, options.output / "photos" / "test")
    environment = build_environment(options.encoder, options.output)
    file = options.output / "rows.json"
    rows: dict[str, Any] = read_json(file) if file.exists() else {}

    for name in options.programs:
        try:
            versions = [f"{package} {version(package)}" for package in PACKAGES[name]]
        except PackageNotFoundError as error:
            print(f"{name}: {error.name} is not installed")
            continue
        if name not in rows:
            rows[name] = {**run_program(name, options.output, environment), "versions": versions}
            write_json(file, rows)
            print(name, rows[name], flush=True)
    table = format_table(rows, num_images=len(test))
    (options.output / "README.md").write_text(table, encoding="utf-8")


def build_environment(encoder: Path, output: Path) -> dict[str, str]:
    """Write the weights for timm, and return the environment variables of the programs."""
    weights = output.resolve() / "timm.pt"
    torch.save(rename_weights(load_file(encoder / "model.safetensors")), weights)
    return {
        **os.environ,
        "ENCODER": str(encoder.resolve()),
        "PHOTOS": str(output.resolve() / "photos"),
        "TIMM_WEIGHTS": str(weights),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }


def rename_weights(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the weights of transformers' DINOv2 with the names of timm and of the authors."""
    renamed = {}
    for name, value in weights.items():
        if "mask_token" in name or "attention.attention." in name:
            continue
        for pattern, replacement in TIMM_NAMES:
            name = re.sub(pattern, replacement, name)
        renamed[name] = value

    pattern = re.compile(r"encoder\.layer\.(\d+)\.attention\.attention\.query\.(weight|bias)")
    for name in weights:
        if match := pattern.fullmatch(name):
            parts = [weights[name.replace("query", part)] for part in ("query", "key", "value")]
            renamed[f"blocks.{match[1]}.attn.qkv.{match[2]}"] = torch.cat(parts)
    return renamed


def run_program(name: str, output: Path, environment: dict[str, str]) -> dict[str, Any]:
    """Run a program, and return its accuracy, CPU seconds, peak memory and lines."""
    folder = output.resolve() / Path(name).stem
    folder.mkdir(exist_ok=True)
    log_file = folder / "log.txt"
    script = PROGRAMS / name
    with log_file.open("wb") as log:
        usage = run_measured(
            script, environment | {"OUTPUT": str(folder)}, stdout=log, stderr=subprocess.STDOUT
        )
    return {
        "accuracy": read_accuracy(folder),
        "cpu_seconds": usage.cpu_seconds,
        "peak_memory": usage.peak_memory,
        "lines": count_lines(script),
    }


@dataclass(frozen=True)
class Usage:
    """What a program used."""

    cpu_seconds: float
    seconds: float
    peak_memory: int  # bytes of the largest process


def run_measured(script: Path, environment: dict[str, str], **streams: Any) -> Usage:
    """Run a program in Python or bash, and return what it used."""
    interpreter = ["bash", "-e"] if script.suffix == ".sh" else [sys.executable]
    start_time = time.perf_counter()
    process = subprocess.Popen([*interpreter, str(script)], env=environment, **streams)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start_time
    if status != 0:
        raise SystemExit(f"{script} failed. Its output folder is {environment['OUTPUT']}")
    return Usage(usage.ru_utime + usage.ru_stime, seconds, usage.ru_maxrss * 1024)


def read_accuracy(folder: Path) -> float:
    """Return the accuracy that a program printed or wrote."""
    result = folder / "result.json"
    if result.exists():
        return float(read_json(result)["accuracy"])
    text = (folder / "log.txt").read_text(encoding="utf-8", errors="replace")
    return float(re.findall(r"^accuracy ([\d.]+)", text, flags=re.MULTILINE)[-1])


def count_lines(script: Path) -> int:
    """Return the number of lines without blank lines and the docstring."""
    text = script.read_text(encoding="utf-8")
    if script.suffix == ".py":
        docstring = ast.parse(text).body[0]
        text = "\n".join(text.splitlines()[docstring.end_lineno :])
    return sum(bool(line.strip()) for line in text.splitlines())


def format_table(rows: dict[str, Any], num_images: int) -> str:
    """Return the table, the most accurate program first, with the versions and the kind of CPU."""
    lines = [
        "| program | accuracy (95%) | CPU seconds | peak memory, GiB | lines |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, row in sorted(rows.items(), key=lambda item: -item[1]["accuracy"]):
        interval = compute_proportion_interval(round(row["accuracy"] * num_images), num_images)
        assert interval is not None
        low, high = interval
        values = [
            f"{row['accuracy']:.1%} ({100 * low:.1f} to {100 * high:.1f})",
            f"{row['cpu_seconds']:,.0f}",
            f"{row['peak_memory'] / 2**30:.1f}",
            str(row["lines"]),
        ]
        lines.append(f"| `{name}` | {' | '.join(values)} |")
    versions = sorted({each for row in rows.values() for each in row["versions"]})
    libraries = [f"torch {torch.__version__}", *versions]
    return "\n".join([*lines, "", f"{get_processor_name()}; {', '.join(libraries)}.", ""])


if __name__ == "__main__":
    main()
