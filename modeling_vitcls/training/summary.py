"""What a run prints before it starts: its images, its model and what it is."""

from collections import Counter
from itertools import chain

from ..data.aspect_ratio import get_resize
from ..data.dataset import Dataset
from ..data.splits import (
    HELD_OUT_SPLITS,
    TrainingData,
    describe_divided_groups,
    describe_leaks,
    describe_missing_classes,
)
from ..hub.local_paths import make_relative
from ..inference.inputs import count_notes
from ..inference.token_names import count_tokens
from ..runtime.files import replace_control_characters
from .plan import RunPlan
from .reporter import Reporter
from .run_inputs import RunInputs


MAX_NAMED_CLASSES = 12  # Maximum number of classes that the summary names


def print_summary(inputs: RunInputs, plan: RunPlan, reporter: Reporter) -> None:
    """Print what the run does, before an image passes a model."""
    # A frozen encoder chooses geometry and pooling itself, later.
    resize = get_resize(inputs.processor) if inputs.head_search is None else None
    reporter.print_lines(
        {
            **describe_splits(plan),
            "resize": resize,
            **inputs.images.facts,
            **describe_model(inputs, plan),
            **inputs.lines,
            **plan.lines,
            "run": f"{plan.kind}: {plan.reason}",
        }
    )


def print_division(
    inputs: RunInputs, plan: RunPlan, data: TrainingData, reporter: Reporter
) -> None:
    """Print how the images were divided, and what is wrong with them.

    Warn about classes that lack images, and about images that cannot measure the run.
    """
    lines = {"start": describe_fitted_images(inputs, plan, data)}
    if plan.is_drawn:
        lines["divided"] = (
            f"{len(data.train):,} training images, {len(data.held_out):,} held-out images "
            f"({data.held_out_name})"
        )
    reporter.print_lines(lines)
    leaks = describe_leaks(data, plan.options.group_column)
    notes = count_notes(data.train.images, inputs.processor.bit_depth)
    for warning in [
        *describe_missing_classes(data),
        *describe_divided_groups(data),
        *leaks,
        *notes,
    ]:
        reporter.warn(warning)
    # They trained its encoder, or a classifier that it keeps.
    num_seen = data.count_seen(inputs.encoder_rows, plan.kind == "frozen")
    if num_seen and not leaks:
        reporter.warn(
            f"the encoder of {inputs.initial.name}, a classifier that this run keeps, or its teacher was "
            f"trained on {num_seen:,} of the images that measure this run, so the result is better "
            "than for new images, and has no interval. Evaluate other images with "
            "`vitcls evaluate` or, if that run held some out, set `held_out_fraction` as in it"
        )


def describe_fitted_images(inputs: RunInputs, plan: RunPlan, data: TrainingData) -> str | None:
    """Compare the images of a run with steps with those to which its model was fitted before.

    None if the run trains on all of them, and holds some others out.
    """
    num_fitted, num_images = inputs.num_fitted, len(data.train)
    if plan.kind == "frozen" or not num_fitted:
        return None
    text = f"{inputs.initial.name} was fitted to {num_fitted:,} of these images"
    if num_fitted > num_images:
        return (
            f"{text}, and this run trains on {num_images:,}, so it may end worse. "
            "`held_out_fraction=0.0` keeps all"
        )
    if len(data.held_out):
        return None
    return f"{text}, so none is held out. `held_out_fraction=0.2` measures the steps on a fifth"


def describe_splits(plan: RunPlan) -> dict[str, str]:
    """Say which splits train, select and measure the model, before images are drawn."""
    lines = {}
    images = plan.images
    (train_split, train), *others = images.images_by_split.items()
    if train_split in HELD_OUT_SPLITS:
        lines["split"] = (
            f"training uses the split {train_split!r}, because no split is named 'train'"
        )
    # The held-out images may still have to be drawn from these.
    texts = [f"{len(train):,} {'images' if plan.is_drawn else 'training images'}"]
    texts += [f"{len(part):,} of split {split!r}" for split, part in others[:-1]]
    texts += [f"{len(part):,} held-out images (split {split!r})" for split, part in others[-1:]]
    if not others and not plan.is_drawn:
        texts.append("none held out")
    lines["data"] = f"{images.name}: {', '.join(texts)}"
    lines["classes"] = describe_class_sizes(images)
    return lines


def describe_class_sizes(images: Dataset) -> str:
    """Count the training images of each class; if there are many, of the smallest and the largest one.

    The text is "" for several tasks.
    """
    label_space = images.label_space
    if label_space.kind == "multi_task":
        return ""
    labels = images.train.labels
    has_lists = label_space.kind == "multi_label_classification"
    counts = Counter(chain.from_iterable(labels) if has_lists else labels)
    names = label_space.names
    sizes = [(counts[label], replace_control_characters(name)) for label, name in enumerate(names)]
    if len(sizes) > MAX_NAMED_CLASSES:
        (smallest, first), (largest, last) = min(sizes), max(sizes)
        return f"{len(sizes):,}, from {smallest:,} images ({first}) to {largest:,} ({last})"
    return ", ".join(f"{name}: {size:,}" for size, name in sizes)


def describe_model(inputs: RunInputs, plan: RunPlan) -> dict[str, str]:
    """Describe the size of the model and its tokens."""
    source, model = inputs.initial.name, inputs.model
    config = model.config
    token_counts = {name: count for name, count in count_tokens(config).items() if count}
    layout_text = " | ".join(f"{count} {name}" for name, count in token_counts.items())
    height, width = config.image_height_width
    pooling_text = f", pooling {config.pooling}" if inputs.head_search is None else ""
    trainable_text = ""
    if plan.options.trainable != "full":
        trainable_text = f" ({model.num_parameters(only_trainable=True):,} of them trainable)"
    source = min(make_relative(source), source, key=len)
    return {
        "model": f"{source}: {model.num_parameters():,} parameters{trainable_text}, "
        f"{config.num_hidden_layers} layers of width {config.hidden_size}{pooling_text}",
        "tokens": f"[ {layout_text} ] = {sum(token_counts.values())} for {height} x {width} pixels",
    }
