"""The sentence of a verdict (diagnosis.py), for the page, the terminal and the JSON file.

describe_verdict(verdict)    the fault or, without one, what was measured, with its 95% interval
"""

from typing import Any

from .ablation import MIN_IMAGES
from .diagnosis import MIN_PATCHES, Fault, Outcome, Verdict


# The values are those of the fault and the numbers of the verdict.
FAULT_SENTENCES = {
    Fault.IDENTICAL: "After layer {layer}, its state is identical to the state of {other}.",
    Fault.SAME_STATE: "After layer {read_layers}, its state is the same for every image.",
    Fault.NOT_MOVED: "Training did not move the token, but moved other tokens.",
    Fault.SAME_ATTENTION: (
        "In {layer_names}, its map is nearly the same in every image, so it says little about a "
        "single image."
    ),
}


def describe_verdict(verdict: Verdict) -> str:
    """Return the sentence of a verdict."""
    headline = verdict.headline
    if headline is Fault.HARMFUL:
        return describe_harm(verdict)
    if isinstance(headline, Fault):
        values = verdict.numbers | verdict.faults[headline]
        layer_names = format_layers(values.get("layers", []))
        return FAULT_SENTENCES[headline].format(layer_names=layer_names, **values)
    if verdict.token == "patches":
        return describe_patches(verdict)
    return describe_outcome(verdict)


def describe_harm(verdict: Verdict) -> str:
    """Return the sentence on predictions that are more accurate without a token."""
    output = verdict.faults[Fault.HARMFUL]["output"]
    effect = verdict.numbers["effects"][output]
    task = f" of {output}" if output else ""
    return (
        f"{describe_ablation(verdict)} changes the accuracy{task} by "
        f"{100 * effect['accuracy_change']:+.1f} percentage points (p = "
        f"{effect['improvement']:.1g}, {effect['num_images']:,} images)."
    )


def describe_outcome(verdict: Verdict) -> str:
    """Return the sentence on the effect of a token or of a group."""
    numbers = verdict.numbers
    outcome = verdict.outcome
    if outcome is Outcome.NOT_MEASURED:
        return "The effects of ablating the token were not measured."
    if outcome is Outcome.FEW_IMAGES:
        return f"There are {numbers['num_images']} images, but {MIN_IMAGES} are needed."

    output = numbers["decided_by"]
    effect = numbers["effects"][output]
    sentence = f"{describe_ablation(verdict)} {describe_effect(effect, output)}"
    place = f"a random token in {'their' if verdict.is_group else 'its'} place"

    if outcome is Outcome.REPLACEABLE:
        return f"{sentence}; {place} does as well."
    if outcome is Outcome.EFFECT and effect["limit"] is not None:
        worse = "has less effect" if effect["size"] > effect["limit"] else "costs accuracy"
        return f"{sentence}; {place} {worse}."
    return f"{sentence}."


def describe_ablation(verdict: Verdict) -> str:
    """Return the subject of a sentence, such as `Replacing it with its mean`."""
    return "Replacing them with their means" if verdict.is_group else "Replacing it with its mean"


def describe_effect(effect: dict[str, Any], output: str) -> str:
    """Return a description of an effect, such as `changes 84% of predictions (80% to 88%)`."""
    if effect["changed"] is None:
        low, high = effect["interval"]
        return (
            f'changes "{output}" features by {effect["size"]:.2g} (cosine distance, interval '
            f"{low:.2g} to {high:.2g})"
        )
    low, high = effect["changed_interval"]
    task = f" of {output}" if output else ""
    return f"changes {effect['changed']:.0%} of predictions{task} ({low:.0%} to {high:.0%})"


def describe_patches(verdict: Verdict) -> str:
    """Return the sentence on the norms of the patches."""
    numbers = verdict.numbers
    mode = numbers["second_mode"]
    if verdict.outcome is Outcome.ARTIFACTS:
        position = f"After layer {numbers['layer']}" if numbers["layer"] else "In the embeddings"
        registers = "more registers" if numbers["has_registers"] else "registers"
        return (
            f"{position}, {mode['fraction']:.1%} of the patches have outlier norms, at "
            f"{mode['ratio']:.1f} times the median norm of the image; {registers} may absorb them "
            "(train with num_register_tokens, or see analysis.register_neurons)."
        )
    if verdict.outcome is Outcome.FEW_PATCHES:
        return (
            f"There are {numbers['num_patches']:,} patches, but {MIN_PATCHES:,} are needed: pass "
            "more images."
        )
    return (
        f"The norms of {numbers['num_patches']:,} patches have one mode; the largest norm is "
        f"{numbers['largest_ratio']:.1f} times the median norm of its image."
    )


def format_layers(layers: list[int]) -> str:
    """Return layer numbers as text, such as "layer 3" or "layers 1 to 3 and 7"."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])

    texts = [f"{run[0]} to {run[-1]}" if len(run) > 1 else str(run[0]) for run in runs]
    text = " and ".join([", ".join(texts[:-1]), *texts[-1:]]) if len(texts) > 1 else "".join(texts)
    return f"layer{'s' if len(layers) > 1 else ''} {text}"
