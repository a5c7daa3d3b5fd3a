"""Other projects' weights -> ours, and back, by tables.

A family of checkpoints is a table of rules, their parameter name -> ours, and a function that reads their
configuration into a `ViTCLSConfig`. This file applies the rules and lives without knowledge of any family.

    rules = [
        Rule("pos_embed", POSITIONS, split_positions, axis=1),
        Rule("patch_embed.proj.{rest}", "embeddings.patch_embeddings.projection.{rest}"),
        Rule("blocks.{i}.attn.qkv.{rest}", [f"layers.{{i}}.attention.{x}_proj.{{rest}}" for x in "qkv"], in_thirds),
        Rule("head_drop.{rest}", []),                      # known, and not needed
    ]

A pattern's `{i}` stands for a number and `{rest}` for anything. The first rule that matches is the one that applies.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from ..configuration_vitcls import TokenLayout, ViTCLSConfig
from ..modeling_vitcls import ViTCLSPreTrainedModel


Transform = Callable[[torch.Tensor, ViTCLSConfig], Sequence[torch.Tensor]]

# Targets of `split_positions`.
POSITIONS = [f"embeddings.position_embeddings.{group}" for group in ("cls", "distillation", "registers", "patches")]


class ConversionError(ValueError):
    """A checkpoint that cannot be taken over exactly; the message names what stands in the way."""


def as_it_is(tensor: torch.Tensor, config: ViTCLSConfig) -> Sequence[torch.Tensor]:
    """One tensor, one target."""
    return [tensor]


def in_thirds(tensor: torch.Tensor, config: ViTCLSConfig) -> Sequence[torch.Tensor]:
    """A fused query, key, value projection [3 * D, ...] -> three."""
    return tensor.chunk(3)


def split_positions(tensor: torch.Tensor, config: ViTCLSConfig) -> Sequence[torch.Tensor]:
    """One table of positions [1, N, D] or [N, D] -> the groups of `POSITIONS`, [1, n, D] each."""
    positions = tensor.reshape(1, -1, config.hidden_size)
    counts = [config.num_cls_tokens, config.num_distillation_tokens, config.num_register_tokens]
    num_positioned_groups = {"patches": 0, "cls": 1, "all": 3}[config.position_embedding_tokens]
    counts[num_positioned_groups:] = [0] * (3 - num_positioned_groups)
    return [positions[:, group] for _, group in TokenLayout.from_counts(*counts).items()]


@dataclass(frozen=True)
class Rule:
    """What becomes of one kind of parameter: its targets in our model, none for what is not needed.

    A target that the model lacks (positions of a group without tokens) receives a tensor without elements from the
    transform, and is left out. On the way back the targets are joined along `axis`.
    """

    pattern: str
    targets: str | Sequence[str]
    transform: Transform = as_it_is
    axis: int = 0

    def match(self, name: str) -> dict[str, str] | None:
        """The values of the pattern's placeholders in `name`, None if it does not fit."""
        found = re.fullmatch(_regular_expression(self.pattern), name)
        return found.groupdict() if found else None

    def apply(self, tensor: torch.Tensor, config: ViTCLSConfig, values: Mapping[str, str]) -> dict[str, torch.Tensor]:
        """Our names and tensors for one of theirs."""
        names = self.names(values)
        if not names:
            return {}
        return dict(zip(names, self.transform(tensor, config), strict=True))

    def names(self, values: Mapping[str, str]) -> list[str]:
        """The targets for these values of the placeholders."""
        targets = [self.targets] if isinstance(self.targets, str) else self.targets
        return [target.format(**values) for target in targets]


def convert_weights(
    weights: Mapping[str, torch.Tensor], rules: Iterable[Rule], config: ViTCLSConfig
) -> dict[str, torch.Tensor]:
    """Translate a state dict.

    Targets that end in `[i]` fill one slice of a stacked parameter.

    Raises:
        ConversionError: for parameters that no rule knows; they are listed.
    """
    rules = list(rules)
    converted: dict[str, torch.Tensor] = {}
    stacked: dict[str, dict[int, torch.Tensor]] = {}
    unknown = []
    for name, tensor in weights.items():
        rule, values = _first_match(rules, name)
        if rule is None:
            unknown.append(name)
            continue
        for target, part in rule.apply(tensor, config, values).items():
            if slot := re.fullmatch(r"(.+)\[(\d+)\]", target):
                stacked.setdefault(slot[1], {})[int(slot[2])] = part
            elif part.numel():
                converted[target] = part
    if unknown:
        raise ConversionError(f"unexpected weights: {_listed(unknown)}")
    for target, parts in stacked.items():
        converted[target] = torch.stack([parts[index] for index in sorted(parts)])
    return converted


def revert_weights(
    weights: Mapping[str, torch.Tensor], rules: Iterable[Rule], wanted: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Translate back: our weights -> those of `wanted`, a state dict that gives their names and shapes.

    What we lack of theirs is left out.

    Raises:
        ConversionError: for weights of ours that have no place there; they are listed.
    """
    rules = list(rules)
    reverted: dict[str, torch.Tensor] = {}
    used = set()
    for name, like in wanted.items():
        rule, values = _first_match(rules, name)
        present = [target for target in rule.names(values) if target in weights] if rule else []
        used.update(present)
        if rule and present:
            joined = torch.cat([weights[target] for target in present], dim=rule.axis)
            reverted[name] = joined.reshape(like.shape)
    if unused := sorted(weights.keys() - used):
        raise ConversionError(f"weights without a place: {_listed(unused)}")
    return reverted


def load_converted(model: ViTCLSPreTrainedModel, weights: Mapping[str, torch.Tensor]) -> ViTCLSPreTrainedModel:
    """Put translated weights into a model, every one of them, and nothing left over.

    Raises:
        ConversionError: for weights that are missing, unexpected or of another shape; they are listed.
    """
    expected = model.state_dict()
    for kind, names in (
        ("missing", sorted(expected.keys() - weights.keys())),
        ("unexpected", sorted(weights.keys() - expected.keys())),
        (
            "of another shape",
            [n for n in sorted(expected.keys() & weights.keys()) if expected[n].shape != weights[n].shape],
        ),
    ):
        if names:
            shapes = [f"{n} {_shape(weights, n)} (the model has {_shape(expected, n)})" for n in names]
            raise ConversionError(f"weights {kind}: {_listed(shapes)}")
    model.load_state_dict({name: tensor.contiguous() for name, tensor in weights.items()})
    return model.eval()


def _first_match(rules: list[Rule], name: str) -> tuple[Rule | None, dict[str, str]]:
    for rule in rules:
        if (values := rule.match(name)) is not None:
            return rule, values
    return None, {}


def _regular_expression(pattern: str) -> str:
    escaped = re.escape(pattern).replace(r"\{i\}", r"(?P<i>\d+)")
    return re.sub(r"\\\{(\w+)\\\}", r"(?P<\1>.+)", escaped)


def _shape(weights: Mapping[str, torch.Tensor], name: str) -> str:
    return str(list(weights[name].shape)) if name in weights else "nothing"


def _listed(names: Sequence[str], most: int = 8) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
