"""Build options of tiny training runs, and read the logs of the runs."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from accelerate import Accelerator
from safetensors.torch import load_file

from helpers.accelerate_state import reset_accelerate
from helpers.tiny_models import assert_same_bits, save_both
from modeling_vitcls import ViTCLSImageProcessor, ViTCLSModel
from modeling_vitcls.cli.api import build_options
from modeling_vitcls.data.labels import LabelSpace
from modeling_vitcls.data.options import AugmentationOptions
from modeling_vitcls.data.splits import divide_images
from modeling_vitcls.runtime.files import read_json
from modeling_vitcls.training.loop import build_batch_plan
from modeling_vitcls.training.model import build_model, resolve_initial_model
from modeling_vitcls.training.options import FinetuneOptions, ModelOptions
from modeling_vitcls.training.plan import plan_run
from modeling_vitcls.training.reporter import Reporter
from modeling_vitcls.training.run import train
from modeling_vitcls.training.run_inputs import load


TINY = ModelOptions(
    model="vitcls-tiny",
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=64,
    image_size=32,
    patch_size=16,
    num_register_tokens=2,
)
PLAIN = AugmentationOptions(crop_scale=1.0, flip=False, augment={"shift": 0.0})
SPEEDS = ("images_per_second", "seconds", "versions")


def build_tiny_options(output_dir: Path, dataset: object, **flags: Any) -> FinetuneOptions:
    """Return options of a training run of a tiny model, or of `model`, in this process.

    `flags` sets further flags.
    """
    model = {} if "model" in flags else vars(TINY)
    settings = {
        **model,
        **vars(PLAIN),
        "num_workers": 0,
        "report": False,
        "probe": False,
    } | flags
    return build_options(FinetuneOptions, output_dir=output_dir, dataset=str(dataset), **settings)


def run_training(options: Any) -> dict[str, Any]:
    """Train in this process, and return the contents of results.json."""
    return read_json(run_to_folder(options) / "results.json")


def run_to_folder(options: Any) -> Path:
    """Train in this process, and return the output folder."""
    reset_accelerate()
    return train(options)


def save_digits_encoder(folder: Path, **flags: Any) -> Path:
    """Train a tiny model on digits, and save its encoder without the classifier."""
    training = {"max_steps": 60, "batch_size": 32, "learning_rate": 3e-3}
    run = run_to_folder(build_tiny_options(folder / "run", "digits", **training | flags))
    processor = ViTCLSImageProcessor.from_pretrained(run)
    return save_both(ViTCLSModel.from_pretrained(run), folder / "encoder", processor)


def forget_end(folder: Path, last_step: int) -> None:
    """Remove what a run wrote after the checkpoint before its last step, as if it was killed."""
    shutil.rmtree(folder / f"checkpoints/step-{last_step:08}")
    for name in ("results.json", "model.safetensors"):
        (folder / name).unlink()


def prepare_setup(options: Any) -> SimpleNamespace:
    """Return what a run prepares: inputs, resolved options, data, plan and reporter."""
    reset_accelerate()
    accelerator = Accelerator(cpu=True)
    reporter = Reporter(options.output_dir / "metrics.jsonl", accelerator)
    inputs = load(options, None, reporter)
    plan = plan_run(inputs, accelerator, is_resumed=False)
    data = divide_images(inputs.images, plan.options.held_out_fraction)
    batches = None
    if plan.kind == "steps":
        batches = build_batch_plan(len(data.train), plan.options, accelerator.num_processes)
    return SimpleNamespace(
        inputs=inputs,
        options=plan.options,
        data=data,
        kind=plan.kind,
        plan=batches,
        reporter=reporter,
    )


def build_initial_model(model: object, label_space: LabelSpace, **flags: Any) -> Any:
    """Return model, image processor and names of new parameters, as at a run's start."""
    options = ModelOptions(model=str(model), **flags)
    initial = resolve_initial_model(options.model)
    config_values = options.get_config_values()
    return build_model(initial, label_space, config_values, options.resize, options.bit_depth)


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Return the records of metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def remove_speeds(values: dict[str, Any]) -> dict[str, Any]:
    """Leave out the values of results and records that differ between equal runs."""
    return {
        name: remove_speeds(value) if isinstance(value, dict) else value
        for name, value in values.items()
        if name not in SPEEDS
    }


def read_compared_values(folder: Path) -> list[dict[str, Any]]:
    """Return results.json and the records of metrics.jsonl, without speeds."""
    return [*map(remove_speeds, (read_json(folder / "results.json"), *read_metrics(folder)))]


def assert_equal_runs(folder: Path, expected: Path) -> None:
    """Check logged values, weights and results to the bit; speeds may differ."""
    assert read_compared_values(folder) == read_compared_values(expected)
    weights = load_file(folder / "model.safetensors")
    expected_weights = load_file(expected / "model.safetensors")
    assert_same_bits(weights, expected_weights)
