"""Which tokens the outputs of a model are computed from, and in how many layers a token is used."""

from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Any

from ..evaluation.token_effects import list_groups
from ..model.configuration_vitcls import ViTCLSConfig


PATCHES = -1  # All patches, in a set of sequence indices of special tokens


@dataclass(frozen=True)
class TokenUse:
    """The tokens that the outputs of a model read.

    Attributes:
        config: configuration of the model.
        has_head: whether the model is a classifier. The outputs of any other model are its CLS
            tokens, distillation tokens and patches.
    """

    config: ViTCLSConfig
    has_head: bool = True

    @cached_property
    def groups(self) -> dict[str, list[int]]:
        """Map each group of special tokens that is not empty to their sequence indices."""
        return list_groups(self.config)

    @cached_property
    def readers(self) -> dict[str, set[int]]:
        """Map each output to the sequence indices of the tokens that it reads.

        These are the special tokens from which the output is computed directly, and PATCHES.
        Outputs are named as in token_effects.py; the distillation head is "distillation".
        """
        config = self.config
        cls = self.groups.get("cls", [])
        distillation = set(self.groups.get("distillation", []))
        if not self.has_head:
            return {"cls": set(cls), "distillation": distillation, "patches": {PATCHES}}
        patches = set() if config.pooling == "cls" else {PATCHES}
        if config.tasks:
            tasks = zip(config.task_labels(), cls, strict=True)
            return {task: {index} | patches for task, index in tasks}

        # The heads of added classes and tasks read tokens, too
        added = [head.layer_poolings for head in config.get_extra_heads().values()]
        poolings = {config.pooling, *chain(*added)}
        heads = {"": set() if poolings == {"cls"} else {PATCHES}}
        if poolings & {"cls", "cls_mean"}:
            num_pooled = 1 if config.cls_pooling == "first" else None
            pooled = config.pooled_cls_tokens or range(config.num_cls_tokens)
            heads[""] |= {cls[index] for index in pooled[:num_pooled]}
        if config.pooling == "attention" and config.attention_pool_tokens == "all":
            heads[""] |= set(range(config.token_layout.num_prefix_tokens))
        if config.has_distillation_head:
            heads["distillation"] = distillation
        return heads

    @cached_property
    def read_tokens(self) -> set[int]:
        """Indices of all tokens that an output reads, as in `readers`."""
        return set().union(*self.readers.values())

    @cached_property
    def num_layers(self) -> list[int]:
        """Number of layers whose output is used, for each special token and the patches.

        The last layer that a head reads is counted only if a head reads the token there. The
        attention of a token is used in the same layers.
        """
        config = self.config
        last_layer = max(config.pooled_layer_indices) if self.has_head else config.num_hidden_layers
        last_layers = dict.fromkeys(self.readers, last_layer)
        if "distillation" in last_layers:
            last_layers["distillation"] = config.num_hidden_layers

        num_layers = [max(last_layers.values()) - 1] * (config.token_layout.num_prefix_tokens + 1)
        for head, indices in self.readers.items():
            for index in indices:
                num_layers[index] = max(num_layers[index], last_layers[head])
        return num_layers


def find_token_use(model: Any) -> TokenUse:
    """Find which tokens the outputs of a model read.

    A regression model is measured like an encoder.
    """
    config = model.config
    has_labels = bool(config.tasks or config.num_labels) and config.problem_type != "regression"
    # By name, because code that was loaded from the Hub has classes of its own with the same names.
    return TokenUse(config, has_labels and type(model).__name__.endswith("Classification"))
