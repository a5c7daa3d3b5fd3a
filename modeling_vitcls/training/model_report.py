"""Report on a finished run: inference speed, images, and the model card with its accompanying files.

A model folder is written -> `build_model_report` loads the model, measures the speed, draws images, writes report.html
                          -> publishing/card.py builds the card
                          -> `write_card` writes the card, the license files and the benchmark entry

All steps run on the main process with the saved model, because the training model may be sharded. The trackers
receive the card's images and the main figures of the report. modeling_vitcls/analysis/ draws figures, and
reporter.py sends images to trackers.
"""

import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub import EvalResultEntry, ModelCard, eval_result_entries_to_yaml
from matplotlib.figure import Figure
from PIL import Image

from ..analysis.card_images import write_card_images
from ..analysis.figures import plot_attention_by_layer, render_figure
from ..analysis.figures_of_states import plot_ablation_effects
from ..analysis.figures_over_depth import plot_attention_mass, plot_curve, plot_norms
from ..analysis.inspection import Inspection, inspect_model
from ..analysis.inspection_inputs import InspectionImages
from ..analysis.report import write_page
from ..data.images import LabeledImages
from ..data.labels import LabelSpace
from ..hub.local_paths import is_local
from ..hub.provenance import Provenance, describe_license_conflict, find_provenance
from ..image_processing_vitcls import ViTCLSImageProcessor
from ..inference.load_model import is_preset
from ..options import FinetuneOptions, PretrainOptions, RunOptions
from ..publishing.manifest import REPORT_FILE
from ..publishing.push_permissions import is_private_repo
from ..system import format_device_name, synchronize
from .reporter import ImageLogger


NUM_SAMPLES = 4  # number of images in the card
NUM_REPORT_IMAGES = 6  # number of images shown in the report
NUM_STATISTICS_IMAGES = 64  # number of images for the statistics in the report
MAX_IMAGES_TO_READ = 20  # maximum number of images to try to read for the card

MAX_BATCH_SIZE = 32  # maximum batch size in images for measuring the inference speed
NUM_REPEATS = 5  # number of measured forward passes
MEASUREMENT_SECONDS = 2.0  # approximate duration of the measurement in seconds

BENCHMARK_FILE = Path(".eval_results", "results.yaml")

Sample = tuple[Image.Image, str | None]  # image, and label as text (None if the images have no labels)


# Report of the saved model -------------------------------------------------------------------------------------------


def build_model_report(
    folder: Path,
    model_class: Any,
    results: dict[str, Any],
    held_out: LabeledImages,
    label_space: LabelSpace,
    device: torch.device,
    should_draw_images: bool,
    warn: Callable[[str], None],
    log_images: ImageLogger | None = None,
    use_samples: bool = True,
) -> dict[str, str]:
    """Load the saved model, write report.html and the card's images to the folder, and return the relative paths
    of these files, keyed by name. Add the inference speed ("inference") and the diagnosis of the special tokens
    ("diagnosis") to `results`.

    Errors are printed as warnings and do not end the run. `log_images` sends named images to the trackers.
    `use_samples` states whether the card may contain held-out images; report.html always contains held-out images.
    """
    paths: dict[str, str] = {}
    (folder / REPORT_FILE).unlink(missing_ok=True)
    with warn_on_error(warn, "the card has no images, because the images could not be drawn"):
        model = model_class.from_pretrained(folder).to(device).eval()
        processor = ViTCLSImageProcessor.from_pretrained(folder)
        results["inference"] = measure_inference_speed(model, device)
        if should_draw_images:
            samples = select_samples(held_out, label_space) if use_samples else []
            paths |= write_card_images(folder, model, processor, results, samples)
            inspection = None
            with warn_on_error(warn, f"{REPORT_FILE} could not be written"):
                inspection = inspect_saved_model(folder, model, processor, results, held_out, label_space)
                results["diagnosis"] = inspection.summary
            if log_images is not None:
                with warn_on_error(warn, "no images were sent to the trackers"):
                    log_images(collect_tracker_images(folder, paths, inspection))
            if inspection is not None:
                paths["report"] = REPORT_FILE
    return paths


@contextmanager
def warn_on_error(warn: Callable[[str], None], message: str) -> Iterator[None]:
    """Convert any error inside the `with` block to a warning."""
    try:
        yield
    except Exception as error:
        warn(f"{message}: {' '.join(str(error).split()) or type(error).__name__}")


def inspect_saved_model(
    folder: Path,
    model: Any,
    processor: ViTCLSImageProcessor,
    results: dict[str, Any],
    held_out: LabeledImages,
    label_space: LabelSpace,
) -> Inspection:
    """Inspect the special tokens on held-out images, write report.html, and return the inspection."""
    labels = held_out.labels if label_space.columns else None
    names = [f"held out, {index}" for index in range(len(held_out))]
    images = InspectionImages(held_out.images, names, labels, f"{results['dataset']}, {results['split']}")
    inspection = inspect_model(
        model,
        processor,
        **images.build_arguments(NUM_REPORT_IMAGES, NUM_STATISTICS_IMAGES),
        token_movement=results["token_movement"],
    )
    write_page(folder / REPORT_FILE, inspection, folder.resolve().name, images.source)
    return inspection


@torch.inference_mode()
def measure_inference_speed(model: Any, device: torch.device) -> dict[str, Any]:
    """Return the median speed in images per second over a few forward passes, and the conditions of the measurement.
    The batch size is 32, or smaller if the measurement would otherwise take too long."""

    def measure_seconds(pixel_values: torch.Tensor) -> float:
        start_time = time.perf_counter()
        model(pixel_values)
        synchronize(device)
        return time.perf_counter() - start_time

    config = model.config
    image = torch.rand(1, config.num_channels, *config.image_height_width, device=device, dtype=model.dtype)
    measure_seconds(image)  # warm up
    batch_size = int(MEASUREMENT_SECONDS / (NUM_REPEATS + 1) / min(measure_seconds(image), measure_seconds(image)))
    batch = image.expand(max(1, min(MAX_BATCH_SIZE, batch_size)), -1, -1, -1).contiguous()
    measure_seconds(batch)
    seconds = [measure_seconds(batch) for _ in range(NUM_REPEATS)]
    return {
        "images_per_second": round(len(batch) / statistics.median(seconds), 1),
        "batch_size": len(batch),
        "repeats": NUM_REPEATS,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": format_device_name(device),
    }


# Samples -------------------------------------------------------------------------------------------------------------


def can_show_samples(
    options: FinetuneOptions | PretrainOptions, repo_id: str | None, warn: Callable[[str], None]
) -> bool:
    """Return whether the card may contain held-out images. Without --card-samples, images of a local dataset are not
    published in a public repository. `repo_id` is the repository to push to, or None if the model is not pushed."""
    run_options, dataset = options.run, options.data.dataset
    if repo_id is None or not is_local(dataset) or run_options.card_samples or not run_options.report:
        return True
    if run_options.hub_private or is_private_repo(repo_id):
        return True
    warn(
        f"the card contains no held-out images, because {dataset} is local and {repo_id} is not known to be "
        "private. Set --card-samples to include images"
    )
    return False


def select_samples(held_out: LabeledImages, label_space: LabelSpace) -> list[Sample]:
    """Return a few readable images with their labels as text, from different classes if possible."""
    samples: list[Sample] = []
    for index in islice(iterate_indices_by_class(held_out.labels), MAX_IMAGES_TO_READ):
        label = label_space.format_label(held_out.labels[index]) if label_space.columns else None
        with suppress(ValueError):  # the evaluation has already reported unreadable images
            samples.append((held_out.images[index], label))
        if len(samples) == NUM_SAMPLES:
            break
    return samples


def iterate_indices_by_class(labels: Iterable[Any]) -> Iterator[int]:
    """Iterate over the indices of labels: the first index of each class, then all other indices."""
    first_indices: dict[str, int] = {}
    other_indices = []
    for index, label in enumerate(labels):
        if first_indices.setdefault(str(label), index) != index:
            other_indices.append(index)
    return chain(first_indices.values(), other_indices)


# Card and accompanying files -----------------------------------------------------------------------------------------


def get_model_provenance(options: FinetuneOptions | PretrainOptions) -> Provenance | None:
    """Return the provenance of the initial model, or None if the initial weights are random."""
    return None if is_preset(options.model.model) else find_provenance(options.model.model)


def get_teacher_provenance(options: FinetuneOptions | PretrainOptions) -> Provenance | None:
    """Return the provenance of the teacher, or None if no teacher is set."""
    teacher = options.distillation.teacher if isinstance(options, FinetuneOptions) else None
    return find_provenance(teacher) if teacher else None


def write_card(
    folder: Path,
    card: ModelCard,
    provenance: Provenance | None,
    results: dict[str, Any],
    options: RunOptions,
    warn: Callable[[str], None],
) -> None:
    """Write README.md, the license files of the initial model, and the leaderboard entry of a benchmark."""
    card.save(folder / "README.md")
    if provenance is not None:
        provenance.copy_license(folder)
    if message := describe_license_conflict(options.license, provenance):
        warn(message)
    (folder / BENCHMARK_FILE).unlink(missing_ok=True)  # remove the file of an earlier run
    if options.eval_benchmark and options.eval_task_id:
        metric = results["selection_metric"]
        interval = results.get(f"{metric}_interval")
        interval_text = f" (95% interval: {interval[0]:.4f} to {interval[1]:.4f})" if interval else ""
        entry = EvalResultEntry(  # huggingface.co/docs/hub/eval-results
            dataset_id=options.eval_benchmark,
            task_id=options.eval_task_id,
            value=results[metric],
            date=datetime.now(UTC).date().isoformat(),
            notes=f"{metric} as a fraction{interval_text}, on {results['num_images']} images of {results['dataset']} "
            f"({results['split']})",
        )
        (folder / BENCHMARK_FILE).parent.mkdir(exist_ok=True)
        text = yaml.safe_dump(eval_result_entries_to_yaml([entry]), sort_keys=False, allow_unicode=True)
        (folder / BENCHMARK_FILE).write_text(text, encoding="utf-8")


def collect_tracker_images(
    folder: Path, image_paths: Mapping[str, str], inspection: Inspection | None
) -> dict[str, Image.Image]:
    """Return the images for the trackers, keyed by name: the card's images, and figures of the inspection if the
    inspection succeeded. `image_paths` are the paths of the card's images in `folder`."""
    images: dict[str, Image.Image] = {name: Image.open(folder / path) for name, path in image_paths.items()}
    if inspection is not None:
        figures = build_report_figures(inspection, use_samples="attention" in image_paths)
        images |= {name: render_figure(figure) for name, figure in figures.items()}
    return images


def build_report_figures(inspection: Inspection, use_samples: bool) -> dict[str, Figure]:
    """Build the main figures of the report. Held-out images are included only if the card contains held-out images,
    because trackers may be remote."""
    config, findings = inspection.config, inspection.findings
    figures = {
        "patch_distance": plot_curve(config, findings, "patch_distance"),
        "norms": plot_norms(config, findings),
    }
    if config.token_layout.num_prefix_tokens:
        figures |= {"entropy": plot_curve(config, findings, "entropy"), "mass": plot_attention_mass(config, findings)}
        if use_samples and inspection.image_reports:
            figures["attention_over_depth"] = plot_attention_by_layer(config, inspection.image_reports[0])
        if inspection.effects:
            figures["effects"] = plot_ablation_effects(config, inspection.effects)
    return figures
