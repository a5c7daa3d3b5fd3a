"""Choose the fastest engine for a job on this CPU (`--backend auto`).

    model = choose_engine(job)          # the model of the job, or a graph that is at least 10% faster

PyTorch, ONNX Runtime and OpenVINO process a batch of the size of the job in turn, three times each.
The graphs are written once, to MODEL/.engines/ (inference/engines.py), and the choice is stored
with the hashes of the model, the kind of CPU, the number of threads and the versions. Nothing is
measured for few images or an unknown number of them, or if the extra `export` is not installed.
"""

import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from ..data.aspect_ratio import has_fixed_size
from ..hub.model_files import hash_files
from ..inference.engines import (
    CHOICES_FILE,
    ENGINE_NAMES,
    ENGINES_FOLDER,
    TORCH,
    Choice,
    Job,
    get_engine_name,
    open_chosen_engine,
    read_choices,
)
from ..runtime.files import write_json
from .exportable import MODEL_CLASSES, Outputs, compute_named_outputs
from .formats import ONNX_PACKAGES, OPENVINO_PACKAGES, convert_to_openvino, write_onnx
from .tracing import select_graph_shape, trace_model


MIN_TIMES_AS_FAST = 1.1  # a smaller gain would be less than the noise of other measurements
NUM_ROUNDS = 3
# Writing and measuring the graphs of a ViT-S takes 12 CPU seconds, and a graph that is 15% faster
# saves them in this many FLOPs: about 1,600 images of 224 pixels.
MIN_FLOPS = 2e13
MAX_RELATIVE_ERROR = 1e-4  # of a graph in float32; in bfloat16, at most twice the error of PyTorch
# Precision -> suffixes of the graphs. ONNX Runtime computes in the dtypes that the file contains.
GRAPH_SUFFIXES = {"no": (".onnx", ".xml"), "bf16": (".xml",)}


def choose_engine(job: Job, print_line: Callable[[str], None]) -> Any:
    """Return the model of a job, or a graph of it that is at least 10% faster.

    A choice is printed in one line.
    """
    if not can_run_graphs(job):
        return job.loaded.model
    try:
        if job.build_key() not in read_choices(job):
            flops = job.loaded.model.flops(job.image_size)
            if job.num_images is None or job.num_images * flops < MIN_FLOPS:
                return job.loaded.model
            save_choice(job, measure_engines(job))
        choice = read_choices(job)[job.build_key()]
        model = open_chosen_engine(job)
    except (ValueError, OSError) as error:
        print_line(f"engine: PyTorch, because {error}")
        return job.loaded.model
    if choice.engine != TORCH:
        print_line(
            f"engine: {get_engine_name(model)}, measured to be {choice.times_as_fast:.2f} times as "
            "fast as PyTorch. `backend='torch'` turns it off"
        )
    return model


def can_run_graphs(job: Job) -> bool:
    """Return whether a job can be done by graphs.

    They require a CPU, a precision of theirs, images of one size, the packages of the extra
    `export`, and a model folder that can be written.
    """
    return (
        job.loaded.model.device.type == "cpu"
        and has_fixed_size(job.loaded.processor)
        and job.mixed_precision in GRAPH_SUFFIXES
        and type(job.loaded.model).__name__ in MODEL_CLASSES
        and all(find_spec(name) for name in {*ONNX_PACKAGES, *OPENVINO_PACKAGES})
        and os.access(job.loaded.folder.path, os.W_OK)
    )


# Measurement --------------------------------------------------------------------------------------


def measure_engines(job: Job) -> Choice:
    """Write the graphs of a job if necessary, measure all engines, and return the fastest.

    Graphs that are not exact enough, or whose outputs are not finite, are left out.
    """
    generator = torch.Generator().manual_seed(0)
    size = (job.loaded.model.config.num_channels, *job.image_size)
    batch = torch.randn(job.loaded.batch_size, *size, generator=generator)
    names = [f"{job.graph_name}{suffix}" for suffix in GRAPH_SUFFIXES[job.mixed_precision]]
    images = batch[:2]
    reference = compute_named_outputs(job.loaded.model, [images])[0]  # in float32
    write_missing_graphs(job, list(reference), names)

    limit = max(MAX_RELATIVE_ERROR, 2 * measure_torch_error(job, images, reference))
    engines = {TORCH: job.loaded.model}
    for name in names:
        graph = job.open_graph(name)
        if measure_error(graph.graph(images), reference) <= limit:
            engines[name] = graph

    seconds = measure_seconds(
        {name: partial(job.run, engine, batch) for name, engine in engines.items()}
    )
    fastest = min(seconds, key=lambda name: seconds[name])
    times_as_fast = seconds[TORCH] / seconds[fastest]
    if times_as_fast < MIN_TIMES_AS_FAST:
        return Choice(TORCH, 1.0)
    return Choice(fastest, round(times_as_fast, 3))


def measure_seconds(works: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """Return the median seconds of each work, over rounds in which each is done twice.

    The first time is not counted, because the threads of the previous engine are still active.
    """
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(NUM_ROUNDS):
        for name, work in works.items():
            work()
            start_time = time.perf_counter()
            work()
            seconds[name].append(time.perf_counter() - start_time)
    return {name: statistics.median(values) for name, values in seconds.items()}


def measure_torch_error(job: Job, images: torch.Tensor, reference: Outputs) -> float:
    """Return the error of PyTorch in the precision of a job, relative to float32."""
    is_autocast = job.mixed_precision == "bf16"
    with torch.autocast("cpu", torch.bfloat16, enabled=is_autocast):
        outputs = compute_named_outputs(job.loaded.model, [images])[0]
    return measure_error(outputs, reference)


def measure_error(outputs: Outputs, reference: Outputs) -> float:
    """Return the largest difference of any output, relative to the largest value of the output.

    The error is NaN if an output is not finite.
    """
    errors = []
    for name, expected in reference.items():
        magnitude = expected.abs().max().clamp(min=torch.finfo(expected.dtype).tiny)
        errors.append((outputs[name] - expected).abs().max() / magnitude)
    return torch.stack(errors).max().item()


# Files --------------------------------------------------------------------------------------------


def write_missing_graphs(job: Job, output_names: list[str], names: list[str]) -> None:
    """Write the graphs of a job, unless all of them exist.

    Their reports contain the hash of the weights. Graphs of another model are removed.
    """
    if not read_choices(job):
        shutil.rmtree(job.engines_folder, ignore_errors=True)
    job.engines_folder.mkdir(exist_ok=True)
    if all((job.engines_folder / name).is_file() for name in names):
        return
    graph_shape = select_graph_shape(job.loaded.model, job.image_size, dynamic=False)
    graph = trace_model(job.loaded.model, graph_shape, torch.float32)
    with tempfile.TemporaryDirectory(
        prefix=f"{ENGINES_FOLDER}.", dir=job.loaded.folder.path
    ) as name:
        folder = Path(name)
        onnx_file = folder / f"{job.graph_name}.onnx"
        write_onnx(graph, graph_shape, output_names, onnx_file)
        convert_to_openvino(onnx_file, onnx_file.with_suffix(".xml"))
        files = sorted(folder.iterdir())
        for suffix in ENGINE_NAMES:
            graph_file = onnx_file.with_suffix(suffix)
            report = {
                "weights_sha256": job.loaded.folder.weights_sha256,
                "sha256": hash_files(files),
            }
            write_json(folder / f"{graph_file.name}.json", report)
        for file in sorted(folder.iterdir()):
            file.replace(job.engines_folder / file.name)


def save_choice(job: Job, choice: Choice) -> None:
    """Add a choice to the choices for a model."""
    choices = {**read_choices(job), job.build_key(): choice}
    record = {
        "model_sha256": job.hash_model(),
        "choices": {key: asdict(each) for key, each in choices.items()},
    }
    write_json(job.engines_folder / CHOICES_FILE, record)
