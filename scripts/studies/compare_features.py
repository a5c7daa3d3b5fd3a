"""Compare the whole job "features of a folder of photographs" with transformers' pipeline and timm.

    python scripts/studies/compare_features.py --encoder ENCODER --photos PHOTOS --output runs/features

ENCODER is a transformers folder of a DINOv2 ViT-S/14, and PHOTOS has a folder per class. Each
program in scripts/studies/compared/features/ starts Python, loads the model, reads the photographs and
writes their CLS tokens. The programs run in turn. The table lists the medians, and the medians of
the ratios within a round.
"""

import shutil
import statistics
import subprocess
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
import tyro
from compare_tools import build_environment, run_measured
from photos import link_photos

from modeling_vitcls.runtime.system import get_processor_name


PROGRAMS = Path(__file__).parent / "compared" / "features"


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
    precisions: tuple[str, ...] = ("fp32", "bf16")
    """Precisions to measure. CPUs without bfloat16 instructions need only fp32."""
    programs: tuple[str, ...] = ("vitcls.sh", "pipeline.py", "timm_loader.py")
    """Programs in scripts/studies/compared/features/ to run; the ratios are those to the first one."""


def main() -> None:
    options = tyro.cli(Options)
    shutil.rmtree(options.output / "photos", ignore_errors=True)
    photos = islice(sorted(options.photos.glob("*/*")), options.num_photos)
    link_photos(photos, options.output / "photos")
    environment = build_environment(options.encoder, options.output)
    environment["OUTPUT"] = str(options.output.resolve() / "features")
    lines = [
        "| precision | program | CPU seconds | seconds | peak memory, MiB | images per CPU "
        "second, vitcls / program |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for precision in options.precisions:
        rounds = []
        for _ in range(options.rounds):
            usages_by_name = {}
            for name in options.programs:
                usages_by_name[name] = run_measured(
                    PROGRAMS / name,
                    environment | {"PRECISION": precision},
                    stderr=subprocess.DEVNULL,
                )
            rounds.append(usages_by_name)
            print(precision, rounds[-1], flush=True)
        for name in options.programs:
            usages = [each[name] for each in rounds]
            ratio = statistics.median(
                each[name].cpu_seconds / each[options.programs[0]].cpu_seconds for each in rounds
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


if __name__ == "__main__":
    main()
