"""In words, with the number they rest on: did each special token learn, do patches hold artifacts, how does CLS look.

verdicts(config, findings, effects, movement, answers)   one Verdict per special token
artifact_verdict(config, findings)                       a sentence or a few
depth_story(config, findings)                            two sentences per special token
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from ..configuration_vitcls import ViTCLSConfig
from .ablation import Answers, Effect, token_keys
from .maps import token_names
from .test_time_registers import OUTLIER_RATIO
from .token_statistics import Findings


Word = Literal[
    "learned", "in use", "not moved", "same for all images", "collapsed", "ignored by the head", "not judged"
]
Meaning = Literal["good", "neutral", "doubtful", "bad"]

FEWEST_IMAGES = 16  # from which on a token's worth is judged
MOVED = 1e-3  # least movement in training, as a part of the token's norm, of a token that learned
SAME_FOR_ALL_IMAGES = 1e-3  # variation below which a token says the same of every image
IDENTICAL = 0.999  # cosine similarity from which on two tokens may be one
APART = 0.01  # distance of two tokens, as a part of their variation over images, below which they are one
ROUNDING = 1e-6  # as a part of a state's norm
NO_EFFECT = 1e-3  # change of the logits, as a part of their variation
MANY_OUTLIERS = 0.005  # share of patches; Darcet et al. 2023 find about 0.02 in DINOv2 without registers
NEAR_UNIFORM, SELECTIVE = 0.75, 2 / 3  # of the tokens, in the first layers; of that, in the middle ones
UNIFORM = 0.9  # of the tokens


@dataclass(frozen=True)
class Verdict:
    """Of one special token.

    Attributes:
        token: as people read it, such as "register 1".
        word: "collapsed" (identical to another), "same for all images", "not moved" (in training), "ignored by the
            head", "learned" (it moved, and the answers need it), "in use" (they need it; whether training moved it is
            not known, or hardly), or "not judged".
        meaning: whether that is good news: "good", "neutral", "doubtful" or "bad".
        reason: one sentence, with the number.
    """

    token: str
    word: Word
    meaning: Meaning
    reason: str


def verdicts(
    config: ViTCLSConfig,
    findings: Findings,
    effects: Mapping[str, Effect] | None = None,
    movement: Mapping[str, float] | None = None,
    answers: Answers | None = None,
) -> list[Verdict]:
    """One per special token, in the order of the sequence.

    Args:
        config: of the model.
        findings: over some dozen images or more; below FEWEST_IMAGES only what needs no comparison is judged.
        effects: `ablation_effects`; None for a model without a classifier.
        movement: how far training moved each token, by names such as `cls[0]` (`token_movement` in results.json);
            None where that is not known.
        answers: the model's (`answers_of`), where the right ones are known: what a token is worth to answers that are
            no better than chance is little, and said to be so.
    """
    names = token_names(config)
    found = []
    for place, key in enumerate(token_keys(config.token_layout)):
        evidence = Evidence(
            findings=findings,
            place=place,
            names=names,
            effect=None if effects is None else effects[key],
            moved=None if movement is None else movement.get(key),
            doubt=doubt_of(answers),
        )
        found.append(Verdict(names[place], *judged(evidence)))
    return found


@dataclass(frozen=True)
class Evidence:
    """What is known of the token at a place of the sequence; `names` of all."""

    findings: Findings
    place: int
    names: list[str]
    effect: Effect | None
    moved: float | None
    doubt: str

    @property
    def has_effect(self) -> bool:
        """Whether holding it at its mean changes anything."""
        return self.effect is not None and (self.effect.logit_change >= NO_EFFECT or self.effect.changed_answers > 0)

    @property
    def is_same_for_all_images(self) -> bool:
        """Its state after the last layer; not if just one huge channel of it is."""
        findings, place = self.findings, self.place
        variation = torch.stack([findings.variation[-1, place], findings.channel_variation[-1, place]]).max()
        return findings.num_images > 1 and variation.item() < SAME_FOR_ALL_IMAGES

    @property
    def twin(self) -> int | None:
        """Place of the token that it is identical to after the last layer."""
        findings, place = self.findings, self.place
        norms = findings.mean_states[-1].norm(dim=-1)  # [S]
        variation = findings.variation[-1] * norms  # [S], in the unit of `apart`
        limit = APART * variation.minimum(variation[place]) + ROUNDING * norms
        is_one = (findings.between_tokens[-1, place] >= IDENTICAL) & (findings.apart[-1, place] <= limit)
        is_one[place] = False
        return int(findings.apart[-1, place].where(is_one, torch.inf).argmin()) if bool(is_one.any()) else None

    def movement(self) -> str:
        """How far training moved it, in words."""
        if self.moved is None:
            return "how far training moved it is not known"
        norm = self.findings.token_norms[0, self.place].item()
        return f"training moved it by {self.moved:.3g} ({self.moved / max(norm, 1e-12):.2g} times its norm)"

    @property
    def has_moved(self) -> bool:
        """Whether it is known that training did."""
        return self.moved is not None and self.moved >= MOVED * self.findings.token_norms[0, self.place].item()


def judged(token: Evidence) -> tuple[Word, Meaning, str]:
    """The word, what it means, and the sentence; the first that holds."""
    findings, effect = token.findings, token.effect
    if token.twin is not None:
        similarity = findings.between_tokens[-1, token.place, token.twin].item()
        distance = findings.apart[-1, token.place, token.twin].item()
        twin = f"{token.names[token.twin]} (cosine {similarity:.4f}, distance {distance:.2g})"
        return "collapsed", "bad", f"after the last layer it is identical to {twin}."
    if token.is_same_for_all_images:
        variation = findings.variation[-1, token.place].item()
        same = f"it is the same for every image (it varies by {variation:.1g} times the norm of its mean state)"
        word: Word = "not moved" if token.moved == 0 else "same for all images"
        return word, "bad", f"after the last layer {same}; {token.movement()}."
    if token.moved == 0:
        return "not moved", *unmoved(token)
    if effect is None:
        return "not judged", "neutral", "without a classifier, what 1 token is worth to an answer cannot be measured."
    if findings.num_images < FEWEST_IMAGES:
        return "not judged", "neutral", f"{too_few(findings.num_images)}."
    if not token.has_effect:
        return "ignored by the head", "doubtful", f"{worth(effect)}."
    reason = f"{worth(effect)}; {token.movement()}{token.doubt}."
    return ("learned", "good", reason) if token.has_moved else ("in use", "neutral", reason)


def unmoved(token: Evidence) -> tuple[Meaning, str]:
    """Of a token that training moved by 0: many are frozen on purpose, or came with a trained model."""
    if token.has_effect and token.effect is not None:
        why = "frozen, or started elsewhere: not moved in this run (by 0), but in use"
        return "neutral", f"{why}: {worth(token.effect)}{token.doubt}."
    if token.effect is None:
        return (
            "neutral",
            "not moved in this run (by 0): frozen, or nothing teaches it; there is no classifier to tell.",
        )
    if token.findings.num_images < FEWEST_IMAGES:
        return "neutral", f"not moved in this run (by 0); whether it is in use: {too_few(token.findings.num_images)}."
    return (
        "bad",
        f"training left it exactly where it started (it moved by 0), and it has no effect: {worth(token.effect)}.",
    )


def too_few(num_images: int) -> str:
    """Images, for what shows only in comparison."""
    return f"{num_images} image{'s are' if num_images > 1 else ' is'} no basis: give {FEWEST_IMAGES} or more"


def worth(effect: Effect) -> str:
    """What becomes of the answers without what the token says of the image."""
    accuracy = ""
    if effect.accuracy_change is not None:
        accuracy = f", accuracy {effect.accuracy_change * 100:+.1f} points"
    return (
        f"holding it at its mean changes the answers to {counted(effect.changed_answers, effect.num_images)} images "
        f"({effect.changed_answers:.1%}{accuracy}), and the logits by {effect.logit_change:.2g} times their spread "
        "over images"
    )


def counted(share: float, num_images: int) -> str:
    """`3 of 64`."""
    return f"{round(share * num_images):,} of {num_images:,}"


def doubt_of(answers: Answers | None) -> str:
    """A clause about a model whose answers are no better than chance; empty where they are, or it is not known."""
    if answers is None or answers.is_better_than_chance() is not False:
        return ""
    return (
        f"; but the model's answers are no better than chance ({answers.accuracy():.1%} right on "
        f"{len(answers.chosen):,} images, the most frequent one always {answers.chance():.1%})"
    )


# Artifacts -----------------------------------------------------------------------------------------------------------


def artifact_verdict(config: ViTCLSConfig, findings: Findings) -> str:
    """Whether patches hold artifacts in the last quarter of the layers, whether registers take them in (Darcet et al.
    2023, arXiv 2309.16588, who look at the output), and what stands out in layers before."""
    outliers = findings.outliers[1:]  # [L], after each layer
    first_of_last = len(outliers) - max(len(outliers) // 4, 1)
    layer = first_of_last + int(outliers[first_of_last:].argmax())
    share = outliers[layer].item()
    beyond = f"beyond {OUTLIER_RATIO:g} times their image's median"
    parts = [f"No artifacts: after the last layers at most {share:.2%} of the patches have a norm {beyond}"]
    if share >= MANY_OUTLIERS:
        more = "more registers" if config.num_register_tokens else "registers"
        advice = f"{more} may take them in (train with --num-register-tokens, or see analysis.test_time_registers)"
        parts = [f"Artifacts: after layer {layer + 1}, {share:.2%} of the patches have a norm {beyond}; {advice}"]
    before = outliers[:first_of_last]
    if len(before) and (most := before.max().item()) >= max(MANY_OUTLIERS, 1.01 * share):
        gone = "" if share >= MANY_OUTLIERS else ", which are gone at the end"
        parts.append(f"Most on the way: {most:.2%}, after layer {int(before.argmax()) + 1}{gone}")
    parts += of_registers(config, findings, layer)
    return ". ".join(parts) + "."


def of_registers(config: ViTCLSConfig, findings: Findings, layer: int) -> list[str]:
    """Whether registers stand out in the patches' place, and what patches do without them; empty where there are none.

    Args:
        layer: index of that after which outliers are counted.
    """
    norms = findings.token_norms[-1, config.token_layout.registers]  # [registers]
    if not len(norms) or findings.outliers_without_registers is None:
        return []
    ratio = norms.max().item() / findings.patch_norms[-1].median().clamp(min=1e-12).item()
    times = f"at most {ratio:.1f} times the patches' median norm"
    said = f"The registers do not stand out ({times})"
    if ratio > OUTLIER_RATIO:
        instead = "instead" if findings.outliers[layer + 1] < MANY_OUTLIERS else "as well"
        said = f"The registers stand out {instead} ({times})"
    with_registers, without = (
        shares[layer + 1].item() for shares in (findings.outliers, findings.outliers_without_registers)
    )
    hidden = "with the registers hidden from attention"
    return [f"{said}; outliers after layer {layer + 1}: {with_registers:.2%}, {hidden} {without:.2%}"]


# Depth ---------------------------------------------------------------------------------------------------------------


def depth_story(config: ViTCLSConfig, findings: Findings) -> list[str]:
    """How selective each special token is, in the first, middle and last third of the layers; of those that answer,
    whether that is as the story has it: near uniform early, selective in the middle.

    The number of tokens that it attends to is the exponential of the entropy; 100% are all that it may see.
    """
    widths = findings.entropy.mean(dim=1).exp()  # [L, S]: tokens attended to, the mean of the heads
    shares = widths / findings.uniform_by_token["entropy"].exp()  # [L, S]
    thirds = torch.stack([part.mean(dim=0) for part in shares.tensor_split(3) if len(part)])  # [3 or fewer, S]
    where = "in the first, middle and last layers" if len(thirds) == 3 else "layer by layer"
    story = []
    for place, name in enumerate(token_names(config)):
        narrowest = int(widths[:, place].argmin())
        width = round(widths[narrowest, place].item())
        answers = place < config.token_layout.registers.start
        told = f" {as_told(shares[:, place], thirds[:, place])}" if answers else ""
        story.append(
            f"{name} attends to {', '.join(f'{third:.0%}' for third in thirds[:, place].tolist())} of the tokens it "
            f"may see {where} (100% is uniform), most selective in layer {narrowest + 1}: {width} "
            f"token{'s' if width != 1 else ''}.{told}"
        )
    return story


def as_told(shares: torch.Tensor, thirds: torch.Tensor) -> str:
    """Whether a token's shares, of each layer [L] and means of thirds of the layers [3], are as in the story."""
    if bool((shares >= UNIFORM).all()):
        return "Uniform throughout: it selects nothing."
    if len(thirds) < 3:
        return "There are too few layers for the story of uniform early and selective middle layers."
    early, middle, _ = thirds.tolist()
    if early >= NEAR_UNIFORM and middle <= SELECTIVE * early:
        return "As the story has it: near uniform early, selective in the middle."
    return "Unlike the story (near uniform early, selective in the middle)."
