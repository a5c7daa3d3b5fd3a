"""What a finished run shows of itself: the speed of its model, pictures, and the files beside its card.

A model folder is written -> `look_at_saved` loads it back, measures it, draws pictures and writes report.html
                          -> the card (hub/card.py) is built
                          -> `write_card` puts it there with licences and the result for a benchmark

All of it happens on the main process, with the plain model: what was trained may be in parts on several devices.

The pictures that a finished run hands to its trackers: those of its card, and the main ones of its report.

Figures are drawn in modeling_vitcls/analysis/, and pictures handed over in reporter.py.
"""

import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub import EvalResultEntry, ModelCard, eval_result_entries_to_yaml
from matplotlib.figure import Figure
from PIL import Image

from ..analysis.card_images import write_pictures
from ..analysis.figures import as_picture, depth_figure
from ..analysis.figures_of_states import effects_figure
from ..analysis.figures_over_depth import curve_figure, mass_figure, norms_figure
from ..analysis.inspection import Inspection, inspect_model
from ..analysis.inspection_inputs import Images
from ..analysis.report import write_page
from ..data.images import LabelledPictures
from ..data.labels import LabelSpace
from ..hub.licenses import overruled
from ..hub.local_paths import is_local
from ..hub.provenance import Origin, origin_of
from ..hub.push_permissions import is_private
from ..image_processing_vitcls import ViTCLSImageProcessor
from ..inference.load_model import is_preset
from ..options import FinetuneOptions, PretrainOptions, RunOptions
from ..system import name_of_device
from .reporter import Track


NUM_SAMPLES = 4  # in the card
NUM_SHOWN = 6  # in the report
NUM_INSPECTED = 64  # for its statistics
MOST_TRIED = 20  # pictures, where some are broken

LARGEST_BATCH = 32
NUM_REPEATS = 5
SECONDS_OF_MEASURING = 2.0

REPORT = "report.html"
BENCHMARK_FILE = Path(".eval_results", "results.yaml")

Sample = tuple[Image.Image, str | None]


# From the saved model ------------------------------------------------------------------------------------------------


def look_at_saved(
    folder: Path,
    model_class: Any,
    results: dict[str, Any],
    held_out: LabelledPictures,
    label_space: LabelSpace,
    device: torch.device,
    draws: bool,
    warn: Callable[[str], None],
    track: Track | None = None,
    with_samples: bool = True,
) -> dict[str, str]:
    """Load the model back, add its speed to the results as "inference", and draw pictures and report.html into the
    folder; of an earlier run none stays.

    A run is not lost for want of pictures: whatever goes wrong costs a warning, in one line.

    Args:
        folder: with the saved model.
        model_class: of the model.
        results: what results.json will hold.
        held_out: pictures to take a few samples from.
        label_space: of their labels.
        device: to measure on.
        draws: whether to draw.
        warn: shows a line.
        track: is given the main pictures by name, where something draws and takes them (`Reporter.track`).
        with_samples: whether the card may show held-out pictures; report.html, which is not published, always does.

    Returns:
        Name of each picture that was drawn -> its path from the folder.
    """
    drawn: dict[str, str] = {}
    (folder / REPORT).unlink(missing_ok=True)
    with forgiving(warn, "the card has no pictures, since they could not be made"):
        model = model_class.from_pretrained(folder).to(device).eval()
        processor = ViTCLSImageProcessor.from_pretrained(folder)
        results["inference"] = inference_speed(model, device)
        if draws:
            samples = samples_of(held_out, label_space) if with_samples else []
            drawn |= write_pictures(folder, model, processor, results, samples)
            inspection = None
            with forgiving(warn, f"{REPORT} could not be written"):
                inspection = inspect_saved(folder, model, processor, results, held_out, label_space)
            if track is not None:
                with forgiving(warn, "the trackers got no pictures"):
                    track(tracked_pictures(folder, drawn, inspection))
    return drawn


@contextmanager
def forgiving(warn: Callable[[str], None], what: str) -> Iterator[None]:
    """Turn an error of any library that draws, or of a device without memory for a second model, into a warning."""
    try:
        yield
    except Exception as error:
        warn(f"{what}: {' '.join(str(error).split()) or type(error).__name__}")


def inspect_saved(
    folder: Path,
    model: Any,
    processor: ViTCLSImageProcessor,
    results: dict[str, Any],
    held_out: LabelledPictures,
    label_space: LabelSpace,
) -> Inspection:
    """Write report.html, on what the special tokens do, with held-out pictures."""
    labels = held_out.labels if label_space.columns else None
    names = [f"held out, {number}" for number in range(len(held_out))]
    images = Images(held_out.pictures, names, labels, f"{results['dataset']}, {results['split']}")
    inspection = inspect_model(
        model, processor, **images.to_inspect(NUM_SHOWN, NUM_INSPECTED), movement=results["token_movement"]
    )
    write_page(folder / REPORT, inspection, folder.resolve().name, images.source)
    return inspection


@torch.inference_mode()
def inference_speed(model: Any, device: torch.device) -> dict[str, Any]:
    """Images per second of the model's forward pass on pixels [B, C, H, W] that are on the device: the median of a few
    passes. The batch is the largest, up to 32, that leaves this short."""

    def seconds_of(pixel_values: torch.Tensor) -> float:
        started = time.perf_counter()
        model(pixel_values)
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        return time.perf_counter() - started

    config = model.config
    image = torch.rand(1, config.num_channels, *config.image_height_width, device=device, dtype=model.dtype)
    seconds_of(image)  # warm up
    fitting = int(SECONDS_OF_MEASURING / (NUM_REPEATS + 1) / min(seconds_of(image), seconds_of(image)))
    batch = image.expand(max(1, min(LARGEST_BATCH, fitting)), -1, -1, -1).contiguous()
    seconds_of(batch)
    seconds = [seconds_of(batch) for _ in range(NUM_REPEATS)]
    return {
        "images_per_second": round(len(batch) / statistics.median(seconds), 1),
        "batch_size": len(batch),
        "repeats": NUM_REPEATS,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": name_of_device(device),
    }


# Samples -------------------------------------------------------------------------------------------------------------


def may_show_samples(
    options: FinetuneOptions | PretrainOptions, repository: str | None, warn: Callable[[str], None]
) -> bool:
    """Whether held-out pictures may be in the card: not where that would publish those of this machine, unasked.

    Args:
        repository: that the result is pushed to; None: none.
        warn: is told why not, in one line.
    """
    run, dataset = options.run, options.data.dataset
    is_published = is_local(dataset) and repository is not None and not run.card_samples and run.report
    if not is_published or run.hub_private or is_private(str(repository)):
        return True
    warn(
        f"the card shows no held-out pictures: those of {dataset} are of this machine, and {repository} is not known "
        "to be private; --card-samples shows them"
    )
    return False


def samples_of(held_out: LabelledPictures, label_space: LabelSpace) -> list[Sample]:
    """A few pictures that can be read, of different classes as far as there are, with their labels in words."""
    return list(islice(readable(held_out, label_space), NUM_SAMPLES))


def readable(held_out: LabelledPictures, label_space: LabelSpace) -> Iterator[Sample]:
    """Pictures and labels, the first of each class before the others; those that cannot be read are left out."""
    for index in islice(by_novelty(held_out.labels), MOST_TRIED):
        try:
            picture = held_out.pictures[index]
        except ValueError:  # BrokenPicture: it was named in the evaluation
            continue
        yield picture, label_space.in_words(held_out.labels[index]) if label_space.columns else None


def by_novelty(labels: Iterable[Any]) -> Iterator[int]:
    """Places of labels: the first of each kind, then all others."""
    first: dict[str, int] = {}
    others = []
    for index, label in enumerate(labels):
        if first.setdefault(str(label), index) != index:
            others.append(index)
    return chain(first.values(), others)


# The card and what goes with it --------------------------------------------------------------------------------------


def origin_of_run(options: FinetuneOptions | PretrainOptions) -> Origin | None:
    """Of the model that a run started from; None for fresh weights."""
    return None if is_preset(options.model.model) else origin_of(options.model.model)


def teacher_of_run(options: FinetuneOptions | PretrainOptions) -> Origin | None:
    """Of the teacher; None where there is none."""
    teacher = options.distillation.teacher if isinstance(options, FinetuneOptions) else None
    return origin_of(teacher) if teacher else None


def write_card(
    folder: Path,
    card: ModelCard,
    origin: Origin | None,
    results: dict[str, Any],
    options: RunOptions,
    warn: Callable[[str], None],
) -> None:
    """Write README.md, the licence that the weights brought along, and what a benchmark's leaderboard takes.

    Raises:
        OSError: if the folder cannot be written.
    """
    card.save(folder / "README.md")
    if origin is not None:
        origin.copy_license(folder)
    if message := overruled(options.license, origin):
        warn(message)
    (folder / BENCHMARK_FILE).unlink(missing_ok=True)  # of an earlier run
    if options.eval_benchmark and options.eval_task_id:
        entry = benchmark_entry(options.eval_benchmark, options.eval_task_id, results)
        (folder / BENCHMARK_FILE).parent.mkdir(exist_ok=True)
        text = yaml.safe_dump(eval_result_entries_to_yaml([entry]), sort_keys=False, allow_unicode=True)
        (folder / BENCHMARK_FILE).write_text(text, encoding="utf-8")


def benchmark_entry(benchmark: str, task_id: str, results: dict[str, Any]) -> EvalResultEntry:
    """The first metric of the results, as the Hub's `.eval_results` has it (docs/hub/eval-results)."""
    metric = "accuracy" if "accuracy" in results else "mean_average_precision"
    known = results.get(f"{metric}_interval")
    between = f", 95 % interval {known[0]:.4f} to {known[1]:.4f}" if known else ""
    return EvalResultEntry(
        dataset_id=benchmark,
        task_id=task_id,
        value=results[metric],
        date=datetime.now(UTC).date().isoformat(),
        notes=f"{metric} as a part of 1, on {results['num_images']} images of {results['dataset']} "
        f"({results['split']}){between}",
    )


def tracked_pictures(folder: Path, drawn: Mapping[str, str], inspection: Inspection | None) -> dict[str, Image.Image]:
    """Pictures by name.

    Args:
        folder: of the run.
        drawn: name of each picture of the card -> its path from the folder.
        inspection: of the trained model; None where it failed.
    """
    pictures: dict[str, Image.Image] = {name: Image.open(folder / path) for name, path in drawn.items()}
    if inspection is not None:
        found = figures(inspection, with_samples="attention" in drawn)
        pictures |= {name: as_picture(figure) for name, figure in found.items()}
    return pictures


def figures(inspection: Inspection, with_samples: bool) -> dict[str, Figure]:
    """The main figures of the report, of what the model has; held-out pictures only where the card shows some, as
    trackers may be elsewhere."""
    config, findings = inspection.config, inspection.findings
    found = {
        "patch_distance": curve_figure(config, findings, "patch_distance"),
        "norms": norms_figure(config, findings),
    }
    if config.token_layout.num_prefix_tokens:
        found |= {"entropy": curve_figure(config, findings, "entropy"), "mass": mass_figure(config, findings)}
        if with_samples and inspection.readings:
            found["attention_over_depth"] = depth_figure(config, inspection.readings[0])
        if inspection.effects:
            found["effects"] = effects_figure(config, inspection.effects)
    return found
