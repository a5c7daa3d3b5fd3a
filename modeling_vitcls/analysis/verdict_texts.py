"""Sentences of verdicts (diagnosis.py), for the page, the terminal and the JSON file.

describe_verdict(verdict)    the faults of a token, then what was measured, with 95% intervals
"""

from typing import Any

from .ablation import MIN_IMAGES
from .diagnosis import MIN_PATCHES, Fault, Outcome, Verdict


# The values are those of the fault and the numbers of the verdict.
FAULT_SENTENCES = {
    Fault.IDENTICAL: "After layer {layer}, its state is identical to the state of {other}.",
    Fault.CUT_OFF: (
        "At most {patch_mass:.2%} of its attention goes to patches, in each layer and head."
    ),
    Fault.LARGE_NORM: (
        "The norm of its embedding is {norm_ratio:.3g} times the median norm of the patches, so "
        "the layers hardly change it (cosine {embedding_similarity:.3f} between embedding and last "
        "state)."
    ),
    Fault.EQUAL_ATTENTION: (
        "Its attention maps nearly equal the maps of {other} (the distance is {distance:.2g} times "
        "their distance from uniform attention)."
    ),
    Fault.NOT_MOVED: "Training did not move the token, but moved other tokens.",
}
ABLATIONS = {
    "information": "replacing {} with {} mean{}",
    "presence": "hiding {} from attention",
}


def describe_verdict(verdict: Verdict) -> str:
    """Return the sentences of a verdict."""
    sentences = [describe_fault(verdict, fault, values) for fault, values in verdict.faults.items()]
    describe: Any = {"patches": describe_patches, "heads": describe_heads}.get(verdict.token)
    if describe is None:
        describe = describe_task if "accuracy" in verdict.numbers else describe_outcome
    return " ".join([*sentences, describe(verdict)])


def describe_fault(verdict: Verdict, fault: Fault, values: dict[str, Any]) -> str:
    """Return the sentence of a fault of a token."""
    numbers = verdict.numbers
    if fault is Fault.HARMFUL:
        effect = numbers[values["ablation"]][values["output"]]
        output = f" of {values['output']}" if values["output"] else ""
        return (
            f"{describe_ablation(verdict, values['ablation'])} changes the accuracy{output} by "
            f"{100 * (effect['accuracy_change'] or 0):+.1f} percentage points (p = "
            f"{effect['improvement']:.1g}, {effect['num_images']:,} images)."
        )

    if fault is Fault.SAME_STATE:
        layer = f"layer {numbers['read_layers']}, the last layer that is used"
        if values["is_last_layer"]:
            layer = "the last layer"
        return f"After {layer}, its state is the same for every image."

    if fault is Fault.SAME_ATTENTION:
        layers = ", ".join(map(str, values["layers"]))
        return f"Its attention selects the same patches in every image (layers {layers})."

    return FAULT_SENTENCES[fault].format(**numbers | values)


def describe_outcome(verdict: Verdict) -> str:
    """Return the sentences on the effect of a token or of a group."""
    numbers = verdict.numbers
    outcome = verdict.outcome
    if outcome is Outcome.NOT_MEASURED:
        return "The effects of ablating the token were not measured."
    if outcome is Outcome.FEW_IMAGES:
        return f"There are {numbers['num_images']} images, but {MIN_IMAGES} are needed."

    kind = numbers["decided_by"]["ablation"]
    output = numbers["decided_by"]["output"]
    effect = numbers[kind][output]
    sentence = f"{describe_ablation(verdict, kind)} {describe_effect(effect, output)}."
    place = f"in {'their' if verdict.is_group else 'its'} place"

    if outcome is Outcome.READ:
        tasks = ", ".join(filter(None, numbers["heads"]))
        if not tasks and not verdict.faults:  # the headline says that it is read
            return sentence
        subject = "They are" if verdict.is_group else "It is"
        return f"{subject} read by the classifier{f' ({tasks})' if tasks else ''}. {sentence}"

    if outcome is Outcome.REPLACEABLE:
        return f"{sentence} A random token {place} does as well."
    if outcome is Outcome.EFFECT and effect["limit"] is not None:
        worse = "has less effect" if effect["size"] > effect["limit"] else "costs accuracy"
        return f"{sentence} A random token {place} {worse}."
    return sentence


def describe_ablation(verdict: Verdict, kind: str) -> str:
    """Return a description of an ablation, such as `Replacing it with its mean`."""
    words = ("them", "their", "s") if verdict.is_group else ("it", "its", "")
    return ABLATIONS[kind].format(*words).capitalize()


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
    """Return the sentences on the norms of the patches."""
    numbers = verdict.numbers
    mode = numbers["second_mode"]
    if verdict.outcome is Outcome.ARTIFACTS:
        position = f"After layer {numbers['layer']}" if numbers["layer"] else "In the embeddings"
        registers = "more registers" if numbers["has_registers"] else "registers"
        sentence = (
            f"{position}, {mode['fraction']:.1%} of the patches have outlier norms, at "
            f"{mode['ratio']:.1f} times the median norm of the image; {registers} may absorb them "
            "(train with num_register_tokens, or see analysis.register_neurons)."
        )
    elif verdict.outcome is Outcome.FEW_PATCHES:
        sentence = (
            f"There are {numbers['num_patches']:,} patches, but {MIN_PATCHES:,} are needed. Pass "
            "more images."
        )
    else:
        sentence = (
            f"The norms of {numbers['num_patches']:,} patches have one mode; the largest norm is "
            f"{numbers['largest_ratio']:.1f} times the median norm of its image."
        )

    if numbers["absorbed_outliers"] is None:
        return sentence
    before, after = numbers["absorbed_outliers"]
    threshold = numbers["second_mode_without_registers"]["threshold"]
    return (
        f"{sentence} The registers absorb outliers (norms above {threshold:.1f} times the median): "
        "with the registers hidden from attention, the fraction of outliers increases from "
        f"{before:.2%} to {after:.2%}."
    )


def describe_heads(verdict: Verdict) -> str:
    """Return the sentences on the attention heads."""
    num_heads = verdict.numbers["num_heads"]
    meanings = {"dead": "add nothing to the tokens", "uniform": "attend to all tokens equally"}
    sentences = []
    for name, meaning in meanings.items():
        if positions := verdict.numbers[name]:
            heads = ", ".join(f"layer {layer + 1} head {head + 1}" for layer, head in positions)
            sentences.append(f"{len(positions)} of {num_heads} heads {meaning}: {heads}.")
    return " ".join(sentences) or f"All {num_heads} heads select tokens and change them."


def describe_task(verdict: Verdict) -> str:
    """Return the sentence on the accuracy of a task."""
    numbers = verdict.numbers
    if verdict.outcome is Outcome.FEW_IMAGES:
        return f"There are {numbers['num_labels']} labels, but {MIN_IMAGES} are needed."
    low, high = numbers["interval"]
    return (
        f"Accuracy {numbers['accuracy']:.1%} (95% interval {low:.1%} to {high:.1%}, "
        f"{numbers['num_labels']:,} labels); the most frequent label alone gives "
        f"{numbers['chance']:.1%}."
    )
