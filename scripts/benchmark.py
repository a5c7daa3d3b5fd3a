# /// script
# requires-python = ">=3.11"
# dependencies = ["modeling_vitcls[cli]"]
#
# [tool.uv.sources]
# modeling_vitcls = { path = "..", editable = true }
# ///
"""Speed of a model on this machine, by backend and precision, next to timm and transformers.

    python scripts/benchmark.py --model runs/mine
    python scripts/benchmark.py --work inference step --backends torch compiled --markdown speed.md
    OMP_NUM_THREADS=1 python scripts/benchmark.py --host-time --work inference step

    torch        this package, as `vitcls predict` opens the model   fp32, bf16 (autocast)
    compiled     torch.compile                                       fp32, bf16
    onnx         onnxruntime (CPU)                                   fp32
    openvino     OpenVINO (CPU), which reads the ONNX file           fp32, bf16
    timm, transformers    the plain ViT of the same size             fp32, bf16 (weights)

In each round, all rows are measured one after the other, and every other round runs in reverse
order. A ratio is the median of the ratios in each round, because the load of the machine affects
all rows of a round. A row whose outputs differ from those of the model by more than `LIMITS` is an
error: speed is compared only if the results agree.

A GPU computes a small model faster than Python starts its kernels. `--host-time` measures this time,
which does not depend on the device, with a model that computes almost nothing.
"""

import copy
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from tools.random_weights import randomize_weights
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.benchmark import Timer, timer
from transformers import PreTrainedModel

from modeling_vitcls import ViTCLSConfig, ViTCLSForImageClassification, pack
from modeling_vitcls.cli.parsing import run_script
from modeling_vitcls.conversion.convert_models import convert_from_timm, convert_from_transformers
from modeling_vitcls.conversion.parity_report import build_random_images
from modeling_vitcls.exporting.exporter import export_model
from modeling_vitcls.exporting.onnx_file import OnnxGraph
from modeling_vitcls.exporting.options import ExportOptions
from modeling_vitcls.exporting.tracing import (
    EXPORTABLE_CLASSES,
    NamedOutputsModel,
    load_exportable_model,
)
from modeling_vitcls.hub.local_paths import strip_folders
from modeling_vitcls.inference.cuda_graphs import GraphedFunction
from modeling_vitcls.runtime.flags import Options, check_minimum, check_value
from modeling_vitcls.runtime.system import get_processor_name, get_versions


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Backend -> precisions. The last backends run exported files, on the CPU and without training.
BACKENDS = {
    "torch": ("fp32", "bf16"),
    "compiled": ("fp32", "bf16"),
    "onnx": ("fp32",),
    "openvino": ("fp32", "bf16"),
}
EXPORT_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
PACKAGES = {"onnx": EXPORT_PACKAGES, "openvino": (*EXPORT_PACKAGES, "openvino")}
# Precision -> OpenVINO's hint. Without a hint, it computes in bfloat16 if the CPU can.
OPENVINO_HINTS = {"fp32": "f32", "bf16": "bf16"}
# Largest difference from the float32 output of the model, divided by the largest absolute value of
# this output.
LIMITS = {"fp32": 1e-4, "bf16": 0.08}
SECONDS_PER_MEASUREMENT = 0.5
NUM_CHECKED_IMAGES = 2
GRAPH = ", CUDA graph"  # how the rows of `--cuda-graphs` are named
HOST_TIME_SETTINGS: dict[str, Any] = {
    "model": "12 layers of 48 channels and 4 patches",
    "backends": ("torch",),
    "precisions": ("fp32",),
    "batch_sizes": (2,),
}
HOST_TIME_CONFIG = ViTCLSConfig(
    hidden_size=48,
    num_hidden_layers=12,
    num_attention_heads=3,
    intermediate_size=192,
    image_size=8,
    patch_size=4,
)

Function = Callable[[], object]


@dataclass(frozen=True)
class BenchmarkOptions(Options):
    """Measure the speed of a model, and compare it with timm and transformers."""

    model: str = "vitcls-small"
    """A model folder, the id of a model on the Hub, or a preset (random weights)."""
    work: tuple[Literal["inference", "step"], ...] = ("inference",)
    """inference: forward passes. step: training steps (forward, backward, AdamW) without data
    loading."""
    backends: tuple[Literal["torch", "compiled", "onnx", "openvino"], ...] | None = None
    """Backends. Default: torch, compiled and, on the CPU, those of onnx and openvino that are
    installed."""
    peers: tuple[Literal["timm", "transformers"], ...] | None = None
    """Other packages, with the plain ViT of the same size. Default: the installed ones."""
    precisions: tuple[Literal["fp32", "bf16"], ...] = ("fp32", "bf16")
    """Precisions."""
    batch_sizes: tuple[int, ...] = (1, 16)
    """Numbers of images per call."""
    rounds: int = 7
    """Number of rounds. Each round measures each row once."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Device. Exported files are measured on the CPU only."""
    cuda_graphs: bool = False
    """Also measure PyTorch and the other packages with a CUDA graph of a forward pass."""
    host_time: bool = False
    """Measure the time that Python and the dispatcher of PyTorch take, and count the kernels. The
    model, the backend, the precision and the batch size are fixed."""
    markdown: Path | None = None
    """Markdown file for the table. The table is also printed."""

    def check(self) -> None:
        check_minimum(self, 1, "rounds")
        check_value(self, "batch_sizes", min(self.batch_sizes) >= 1, "1 or more")


@dataclass
class Row:
    """One engine (a backend or peer) in one precision, and its throughput in each round."""

    work: str
    engine: str
    precision: str
    batch_size: int
    # from the float32 output of the model, relative to its largest absolute value
    difference: float
    throughputs: list[float] = field(default_factory=list)  # images per second

    def compute_ratios(self, other: "Row") -> list[float]:
        """Return the quartiles of the ratios of this row to another row: lower, median, upper."""
        ratios = [a / b for a, b in zip(self.throughputs, other.throughputs, strict=True)]
        return (
            statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
        )


def run_benchmarks(settings: BenchmarkOptions) -> list[Row]:
    """Measure all rows, and print one line about each row.

    Raises:
        ValueError: If the model cannot be loaded, the device does not support a backend, or outputs
            differ by more than the limit.
    """
    settings = set_default_engines(settings)
    exported = set(PACKAGES) & set(settings.backends or ())
    if exported and settings.device != "cpu":
        raise ValueError(
            f"{', '.join(exported)} is measured on the CPU only. Change --backends, or omit "
            "--device"
        )
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        model = load_model(settings, Path(folder, "model"))
        for work in settings.work:
            build_engines = {"inference": build_inference_engines, "step": build_step_engines}[work]
            for batch_size in settings.batch_sizes:
                images = build_random_images((batch_size, *get_image_shape(model.config))).to(
                    settings.device
                )
                functions: list[Function] = []
                new_rows = []
                for name, precision, function, difference in build_engines(
                    model, settings, images, Path(folder)
                ):
                    if not difference <= LIMITS[precision]:  # also true for NaN
                        raise ValueError(
                            f"{name} in {precision} differs from the model by {difference:.2g} of "
                            f"the largest output, more than {LIMITS[precision]:g}. Speed is "
                            "compared only if the outputs agree"
                        )
                    functions.append(function)
                    new_rows.append(Row(work, name, precision, batch_size, difference))
                measure_rows(new_rows, functions, settings.rounds)
                for row, function in zip(new_rows, functions, strict=True):
                    speed = statistics.median(row.throughputs)
                    kernels = f", {count_kernels(function)} kernels" if settings.host_time else ""
                    print(
                        f"{work}, batch {batch_size}: {row.engine} {row.precision}: {speed:.1f} "
                        f"images/s{kernels}"
                    )
                rows += new_rows
    return rows


def set_default_engines(settings: BenchmarkOptions) -> BenchmarkOptions:
    """Replace None by all backends and peers that are installed and that run on the device."""
    if settings.host_time:
        settings = replace(settings, **HOST_TIME_SETTINGS)
    is_cpu = settings.device == "cpu"
    exported = [
        name for name, packages in PACKAGES.items() if is_cpu and all(map(find_spec, packages))
    ]
    defaults: dict[str, Any] = {
        "backends": ("torch", "compiled", *exported),
        "peers": tuple(filter(find_spec, ("timm", "transformers"))),
    }
    return replace(
        settings,
        **{name: value for name, value in defaults.items() if getattr(settings, name) is None},
    )


def load_model(settings: BenchmarkOptions, folder: Path) -> Any:
    """Load a model in float32, and save it to `folder`, from which it is exported.

    A preset gets random weights.
    """
    if settings.host_time:
        model: Any = randomize_weights(ViTCLSForImageClassification(HOST_TIME_CONFIG))
    else:
        loaded, _, source_folder = load_exportable_model(settings.model)
        model = randomize_weights(loaded) if source_folder is None else loaded
        model.save_pretrained(folder)
    return pack(model)


def get_image_shape(config: ViTCLSConfig) -> tuple[int, int, int]:
    """Return (channels, height, width)."""
    return (config.num_channels, *config.image_height_width)


# Engines ------------------------------------------------------------------------------------------

# Name, precision, function to measure, relative difference of the outputs
Engines = Iterator[tuple[str, str, Function, float]]


def build_inference_engines(
    model: Any, settings: BenchmarkOptions, images: torch.Tensor, folder: Path
) -> Engines:
    """Yield, for each engine, a function that computes the outputs for images [B, C, H, W]."""
    for name, precision in list_engines(settings):
        weights = "fp32" if name == "torch" else precision
        ours, engine = build_engine(name, precision, weights, model, settings.device, folder)
        batch = images if name in PACKAGES else images.to(DTYPES[precision])
        difference = compare_outputs(engine, batch, ours, images)
        yield name, precision, torch.no_grad()(partial(engine, batch)), difference
        if settings.cuda_graphs and name not in (*PACKAGES, "compiled"):
            graphed = GraphedFunction(engine, batch.device)
            function = torch.no_grad()(partial(graphed, batch))
            yield f"{name}{GRAPH}", precision, function, difference


def build_step_engines(
    model: Any, settings: BenchmarkOptions, images: torch.Tensor, folder: Path
) -> Engines:
    """Yield a function that takes a training step, for each engine that can be trained.

    A step is forward, backward and AdamW. The weights are float32; bf16 is autocast.
    """
    for name, precision in list_engines(settings):
        if name in PACKAGES:
            continue
        ours, engine = build_engine(name, precision, "fp32", model, settings.device, folder)
        difference = compare_outputs(engine, images, ours, images)
        optimizer = torch.optim.AdamW(engine.train().parameters(), lr=1e-5, fused=True)
        yield name, precision, partial(take_step, engine, optimizer, images), difference


def take_step(engine: nn.Module, optimizer: torch.optim.Optimizer, images: torch.Tensor) -> None:
    """Take one training step with fixed labels."""
    logits = engine(images).float().flatten(1)
    loss = nn.functional.cross_entropy(
        logits, torch.arange(len(images), device=images.device) % logits.shape[1]
    )
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def list_engines(settings: BenchmarkOptions) -> list[tuple[str, str]]:
    """Return the names and precisions of the engines that the settings select."""
    engines: dict[str, tuple[str, ...]] = {name: BACKENDS[name] for name in settings.backends or ()}
    engines |= {name: tuple(DTYPES) for name in settings.peers or ()}
    return [
        (name, key)
        for name, precisions in engines.items()
        for key in precisions
        if key in settings.precisions
    ]


def build_engine(
    name: str, precision: str, weights: str, model: Any, device: str, folder: Path
) -> tuple[nn.Module, nn.Module]:
    """Return a vitcls model on the CPU, and the engine that must have the same outputs.

    If the weights have another precision than the products, this is autocast.
    """
    if name in PACKAGES:
        return FirstOutput(model), FirstOutput(open_exported_graph(name, precision, folder))
    ours = model
    if name == "timm":
        engine = build_timm_vit(model.config)
        ours = convert_from_timm(engine)
    elif name == "transformers":
        engine = build_transformers_vit(model.config)
        ours = convert_from_transformers(engine)
    else:
        engine = copy.deepcopy(model)
    engine = FirstOutput(nn.Module.to(engine, device, DTYPES[weights]))
    if weights != precision:
        engine.forward = torch.autocast(device, DTYPES[precision])(engine.forward)  # type: ignore[method-assign]
    if name == "compiled":
        engine.compile()
    return FirstOutput(ours).eval(), engine.eval()


def open_exported_graph(
    backend: str, precision: str, folder: Path
) -> Callable[[torch.Tensor], dict[str, torch.Tensor]]:
    """Export the saved model in `folder` once, and open the graph."""
    file = folder / "model.onnx"
    if not file.exists():
        export_model(ExportOptions(model=str(folder / "model"), output=file, dynamic=False))
    if backend == "onnx":
        return OnnxGraph(file)
    import openvino

    hints = {
        "INFERENCE_PRECISION_HINT": OPENVINO_HINTS[precision],
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
    }
    graph = openvino.Core().compile_model(file, "CPU", hints)
    return lambda pixel_values: {"": torch.from_numpy(graph(pixel_values.numpy())[0].copy())}


class FirstOutput(nn.Module):
    """Wrapper that returns the first output of a model.

    It is the logits of a classifier, or the final tokens of an encoder.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = NamedOutputsModel(model) if type(model) in EXPORTABLE_CLASSES else model

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Return the first output [B, ...] for images [B, C, H, W]."""
        outputs = self.model(pixel_values)
        return outputs if isinstance(outputs, torch.Tensor) else next(iter(outputs.values()))


def build_timm_vit(config: ViTCLSConfig) -> nn.Module:
    """Build timm's ViT of the same size, with random weights."""
    from timm.models import VisionTransformer

    return randomize_weights(
        VisionTransformer(
            img_size=config.image_height_width,
            patch_size=config.patch_height_width,
            in_chans=config.num_channels,
            embed_dim=config.hidden_size,
            depth=config.num_hidden_layers,
            num_heads=config.num_attention_heads,
            mlp_ratio=config.intermediate_size / config.hidden_size,
            num_classes=config.num_labels or 0,
        )
    )


def build_transformers_vit(config: ViTCLSConfig) -> PreTrainedModel:
    """Build transformers' ViT of the same size, with random weights."""
    from transformers import ViTConfig, ViTForImageClassification

    names = (
        "image_size",
        "patch_size",
        "num_channels",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
    )
    sizes = {name: getattr(config, name) for name in (*names, "intermediate_size", "num_labels")}
    return randomize_weights(ViTForImageClassification(ViTConfig(**sizes)))


@torch.no_grad()
def compare_outputs(
    engine: nn.Module, batch: torch.Tensor, ours: nn.Module, images: torch.Tensor
) -> float:
    """Return the largest difference of two engines, divided by the largest expected value."""
    outputs = engine(batch[:NUM_CHECKED_IMAGES]).float().cpu()
    expected = ours(images[:NUM_CHECKED_IMAGES].cpu())
    return ((outputs - expected).abs().max() / expected.abs().max()).item()


# Measurement --------------------------------------------------------------------------------------


def measure_rows(rows: list[Row], functions: list[Function], num_rounds: int) -> None:
    """Append one throughput per round to each row."""
    for round_index in range(num_rounds):
        for row, function in list(zip(rows, functions, strict=True))[
            :: -1 if round_index % 2 else 1
        ]:
            row.throughputs.append(row.batch_size * measure_calls_per_second(function))


def measure_calls_per_second(function: Function) -> float:
    """Return the number of calls per second."""
    clock = time.process_time if uses_cpu_time() else timer  # `timer` synchronizes the GPU
    measurement = Timer(
        "function()",
        globals={"function": function},
        num_threads=torch.get_num_threads(),
        timer=clock,
    )
    return 1 / measurement.blocked_autorange(min_run_time=SECONDS_PER_MEASUREMENT).median


def uses_cpu_time() -> bool:
    """Return whether speed is measured per second of CPU time, which requires one thread.

    Other programs hardly change the CPU time.
    """
    return torch.get_num_threads() == 1 and not torch.cuda.is_initialized()


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


def count_kernels(function: Function) -> int:
    """Count the kernels that a call starts."""
    with KernelCounter() as counter:
        function()
    return counter.count


# Report -------------------------------------------------------------------------------------------


def format_markdown(rows: list[Row], settings: BenchmarkOptions) -> str:
    """Return a Markdown table of the rows, and a caption with the machine and the versions."""
    settings = set_default_engines(settings)
    lines = [
        "| work | engine | images/s | x torch fp32 | x peers, same precision |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        group = [
            other for other in rows if (other.work, other.batch_size) == (row.work, row.batch_size)
        ]
        baseline = [
            other for other in group if (other.engine, other.precision) == ("torch", "fp32")
        ]
        peers = [
            other
            for other in group
            if other.engine in (settings.peers or ()) and other.precision == row.precision
        ]
        speed = statistics.median(row.throughputs)
        cells = (
            f"{row.work}, batch {row.batch_size}",
            f"{row.engine} {row.precision}",
            f"{speed:.1f}",
            ", ".join(format_ratio(row, other) for other in baseline),
            ""
            if row in peers
            else ", ".join(f"{other.engine} {format_ratio(row, other)}" for other in peers),
        )
        lines.append(f"| {' | '.join(cells)} |")
    libraries = (
        "timm",
        *(package for name in settings.backends or () for package in PACKAGES.get(name, ())[2:]),
    )
    versions = ", ".join(f"{name} {version}" for name, version in get_versions(*libraries).items())
    second = "CPU second" if uses_cpu_time() else "second"
    machine = torch.cuda.get_device_name() if settings.device == "cuda" else get_processor_name()
    caption = (
        f"{strip_folders(settings.model)}: images per {second}, medians of {settings.rounds} "
        f"rounds, with quartiles. {machine}, {torch.get_num_threads()} thread(s); {versions}; "
        f"{time.strftime('%Y-%m-%d')}."
    )
    return "\n".join([*lines, "", caption, ""])


def format_ratio(row: Row, other: Row) -> str:
    """Format the median and the quartiles of the ratios of two rows."""
    lower, median, upper = row.compute_ratios(other)
    return f"{median:.2f} ({lower:.2f} to {upper:.2f})"


# The program --------------------------------------------------------------------------------------


def run(options: BenchmarkOptions) -> None:
    """Measure, print the table, and write the file."""
    from modeling_vitcls.cli.export import silence_exporters

    silence_exporters()
    text = format_markdown(run_benchmarks(options), options)
    print(f"\n{text}")
    if options.markdown is not None:
        options.markdown.parent.mkdir(parents=True, exist_ok=True)
        options.markdown.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    run_script(BenchmarkOptions, run)
