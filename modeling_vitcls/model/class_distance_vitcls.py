# Copyright 2026 The modeling_vitcls maintainers
# SPDX-License-Identifier: Apache-2.0
"""Class statistics in a model: where they are stored, and whether they fit its present weights.

    ClassDistance.forward    tokens -> distance [B] to the nearest class
    ClassDistance.check      weights -> whether the statistics belong to them

frozen/class_statistics.py fits the statistics. They belong to one encoder: after any change of
its weights, distances mean nothing. The fingerprint of these weights is therefore stored next to the
statistics, and compared with the present weights before a distance is returned.
"""

import copy
import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers.utils import logging

from .attention_masks_vitcls import list_last_tokens
from .configuration_vitcls import ViTCLSConfig
from .heads_vitcls import TokenPooler
from .token_layout_vitcls import COUNT_FIELDS, TOKEN_KINDS


logger = logging.get_logger(__name__)

NUM_SUMS = 16  # Number of sums in a fingerprint
# Sums are stored as integers in this unit: a cast of the model to half precision leaves integers as
# they are.
SUM_UNIT = 2.0**-24
# Relative rounding of each weight, if all of them are numbers of bfloat16 or float16; and otherwise,
# as after a merge of LoRA in float32
HALF_ROUNDING, ROUNDING = 2.0**-9, 2.0**-22
GOLDEN_RATIO = 0.618033988749895
NUM_SAMPLES = 64  # Weights of each parameter, which tell which of the two applies
# Largest sum of the squared deviations of a fingerprint, in units of what rounding may cause. Rounding
# to bfloat16 gives about 0.4 for each of the sums.
MAX_DEVIATION = 24.0


num_steps = 0  # Steps of all optimizers of this process


def count_step(*_: Any) -> None:
    """Count a step of an optimizer: PyTorch does not count what a fused one changes."""
    global num_steps
    num_steps += not torch.compiler.is_compiling()


register_optimizer_step_post_hook(count_step)


class ClassDistance(nn.Module):
    """Class means and covariances of several tokens, and the distance to the nearest class.

    The state dict has, for each token i of `config.class_statistics`, `means_i` [K, D] and
    `precisions_i` [D, D]; for all tokens, `counts` [K] (number of training images) and `sizes`
    (effective number of features); and `fingerprint` of the encoder that they were fitted to. With
    added classes, `scales` [K] divide the distances to each class.

    Attributes:
        layers: indices, from 1, of the layers that are read.
        num_together: numbers of classes that were fitted, or added, at a time.
        is_valid: whether the statistics belonged to the weights of the last `check`.
    """

    # transformers keeps these in float32, in a model of any precision: all but the fingerprint.
    _keep_in_fp32_modules_strict = {r"class_distance\.[cmps]"}

    def __init__(self, config: ViTCLSConfig) -> None:
        super().__init__()
        # Also if transformers builds the model in half precision
        zeros = partial(torch.zeros, dtype=torch.float32)
        statistics = config.class_statistics or {}
        self.tokens = [(layer, kind) for layer, kind in statistics["tokens"]]
        self.layers = config.resolve_layers([layer for layer, _ in self.tokens])
        self.poolers = [TokenPooler(config, kind) for _, kind in self.tokens]
        num_classes = statistics["num_classes"]
        num_added = [*map(len, config.get_added_classes().values())]
        self.num_together = [num_classes - sum(num_added), *num_added]
        for index, (_, kind) in enumerate(self.tokens):
            size = config.compute_pooled_size(kind, 1)
            self.register_buffer(f"means_{index}", zeros(num_classes, size))
            self.register_buffer(f"precisions_{index}", zeros(size, size))
        if statistics.get("has_scales"):
            self.scales = nn.Buffer(zeros(num_classes))
        self.counts = nn.Buffer(zeros(num_classes))
        self.sizes = nn.Buffer(zeros(len(self.tokens)))
        self.fingerprint = nn.Buffer(torch.zeros(NUM_SUMS, dtype=torch.int64))
        self.is_valid = True
        self.checked_state: list[Any] | None = []
        self.checked_steps = 0
        self.has_warned = False
        self.terms: list[tuple[Tensor, ...]] = []
        self.state_of_terms: list[Any] = []

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move the buffers, but keep them in float32: half precision has too few digits for them."""

        def move(buffer: Tensor) -> Tensor:
            moved = fn(buffer)
            return moved if moved.dtype == buffer.dtype else buffer.to(moved.device)

        return super()._apply(move, recurse)

    def forward(self, layer_tokens: Mapping[int, Tensor]) -> Tensor:
        """Compute the Mahalanobis distance [B] to the nearest class mean (arXiv 1807.03888).

        It is the root of the mean over the tokens of the squared distances, without the noise of
        the means of few images (`sizes` / `counts`).

        Args:
            layer_tokens: layer index -> tokens [B, N, D] after the final norm.
        """
        pooled = [
            pooler(layer_tokens[layer])
            for layer, pooler in zip(self.layers, self.poolers, strict=True)
        ]
        # FLOPs are counted on "meta"
        device = "cpu" if pooled[0].is_meta else pooled[0].device.type
        squares = []
        # The distance is a difference of large numbers, for which bfloat16 has too few digits.
        with torch.autocast(device, enabled=False):
            for index, (values, terms) in enumerate(zip(pooled, self.get_terms(), strict=True)):
                center, means, of_means = terms
                values = values.float() - center
                products = values @ getattr(self, f"precisions_{index}")  # [B, D]
                own = (products * values).sum(dim=1, keepdim=True)
                parts = [products @ part.T for part in means.split(self.num_together)]
                squares.append(own - 2 * torch.cat(parts, dim=1) + of_means)  # [B, K]
        distances = torch.stack(squares).mean(dim=0)
        if "scales" in self._buffers:
            distances = distances / self.scales.square()
        # The mean of a class without images is a placeholder, and must not be the nearest one.
        distances = distances.masked_fill(self.counts == 0, torch.inf)
        # Without the noise of the means, an estimated square can be slightly negative.
        return distances.amin(dim=1).clamp(min=0).sqrt()

    def get_terms(self) -> list[tuple[Tensor, ...]]:
        """Take what `compute_terms` returns from the last pass, unless a buffer has changed since."""
        if torch.compiler.is_compiling():
            return self.compute_terms()
        state = [read_state(buffer) for buffer in self.buffers()]
        if state == self.state_of_terms:
            return self.terms
        with torch.inference_mode(False), torch.no_grad():
            terms = self.compute_terms()
        try:
            terms[0][0].data_ptr()
        except RuntimeError:  # A tensor of torch.func, which ends with its function
            return terms
        self.terms, self.state_of_terms = terms, state
        return terms

    def compute_terms(self) -> list[tuple[Tensor, ...]]:
        """Compute what is the same for all images.

        Far from zero, squares would be large and their differences inexact. A common shift does not
        change these.

        Returns:
            For each token, a center [D], the means around it [K, D], and their squares without the
            noise [K].
        """
        terms: list[tuple[Tensor, ...]] = []
        for index in range(len(self.tokens)):
            means = getattr(self, f"means_{index}")
            # Added classes do not change the bits of old ones, which have their own center and products.
            center = means[: self.num_together[0]].mean(dim=0)
            means = means - center
            noise = self.sizes[index] / self.counts.clamp(min=1)
            precision = getattr(self, f"precisions_{index}")
            products = torch.cat([part @ precision for part in means.split(self.num_together)])
            terms.append((center, means, (products * means).sum(dim=1) - noise))
        return terms

    def check(self, encoder: nn.Module) -> bool:
        """Find out whether the statistics were fitted to the present weights of the encoder.

        The weights are read once after each change, after training mode, and after steps of any optimizer.
        PyTorch does not count edits of `parameter.data` in place, so call `model.train()` before and
        `model.eval()` after them.
        """
        # torch.compile and torch.export cannot trace this. Their graph depends on `is_valid`.
        if torch.compiler.is_compiling():
            return self.is_valid
        if num_steps != self.checked_steps:
            self.checked_steps = num_steps
            if self.is_valid is False and torch.is_grad_enabled():
                return False  # A model that is trained in evaluation mode changes with each step
            self.checked_state = []
        state = self.list_states(encoder)
        if state is None or state == self.checked_state:
            return bool(state and self.is_valid)

        self.is_valid = self.has_fingerprint_of(encoder)
        self.checked_state = state
        if not self.is_valid and not self.has_warned:
            self.has_warned = True
            logger.warning(
                "class statistics (`distance`, `unknown`): not used, because the file lacks them, or "
                "they do not belong to these weights of the encoder, or the weights are sharded, "
                "quantized or offloaded. `vitcls finetune --model FOLDER` fits a classifier and them"
            )
        return self.is_valid

    def list_states(self, encoder: nn.Module) -> list[Any] | None:
        """List what changes with any edit of the weights or the fingerprint, without reading them."""
        try:
            return [*read_state(self.fingerprint), *list_states(encoder)]
        except RuntimeError:  # Under torch.func, weights have no memory, and may be several
            return None

    def has_fingerprint_of(self, encoder: nn.Module) -> bool:
        """Compare the stored fingerprint with the weights of an encoder.

        Rounding to half precision is no change. Weights that are not in memory as plain numbers
        (quantized, sharded, offloaded) cannot be compared, so the statistics do not count as theirs.
        """
        if self.fingerprint.is_meta:
            return True
        sums = sum_weights(encoder)
        if sums is None:
            return False
        totals, roundings = sums
        # A product of integers and a float would be in float32, which has too few digits.
        deviations = (self.fingerprint.cpu().double() * SUM_UNIT - totals) / roundings
        return float(deviations.square().sum()) < MAX_DEVIATION

    def store_fingerprint(self, encoder: nn.Module) -> None:
        """Declare that the statistics belong to the present weights of the encoder."""
        sums = sum_weights(encoder)
        if sums is not None:
            self.fingerprint.copy_((sums[0] / SUM_UNIT).round())
            self.checked_state = self.list_states(encoder)
            self.is_valid = True


# Fingerprint --------------------------------------------------------------------------------------


def build_factors(values: Tensor) -> tuple[Tensor, Tensor]:
    """Build different factors, from 1 to 2, for the rows and the columns of a weight [R, C].

    The multiples of the golden ratio, modulo 1, have no order. SGD moves a special token or position
    by numbers whose sum is 0, because a norm removes the mean of the features that follow.
    """
    numbers = [torch.arange(n, dtype=torch.float64, device=values.device) for n in values.shape]
    rows, columns = [1 + (each * GOLDEN_RATIO) % 1 for each in numbers]
    return rows, columns


@torch.no_grad()
def sum_weights(encoder: nn.Module) -> tuple[Tensor, Tensor] | None:
    """Sum the weights of an encoder [NUM_SUMS], and estimate by how much rounding changes the sums.

    The sums are of the embeddings, the special tokens, the final norm, other parts, and the layers.
    Rows and columns have different factors, so a sum depends on their order. The result is in float64
    on the CPU; None if weights are not in memory as plain numbers.
    """
    totals: list[list[Tensor]] = [[] for _ in range(NUM_SUMS)]
    squares: list[list[Tensor]] = [[] for _ in range(NUM_SUMS)]
    are_rounded: list[Tensor] = []
    num_layers = len(encoder.layers)  # type: ignore[arg-type]
    is_open = find_open_tokens(encoder)
    for name, weight in list_effective_weights(encoder):
        is_plain = type(weight) in (Tensor, nn.Parameter) and weight.is_floating_point()
        if not is_plain or weight.is_meta:
            return None
        if name in is_open:
            weight = weight * is_open[name]
        values = weight.flatten(1) if weight.ndim > 1 else weight[:, None]
        values = values.cpu() if values.device.type == "mps" else values  # Has no float64
        rows, columns = build_factors(values)
        part, own_name = name.split(".")[:2]
        index = {"embeddings": 0, "layernorm": 1}.get(part, 2)
        if own_name in [kind.parameter for kind in TOKEN_KINDS]:
            index = 3
        elif part == "layers":
            index = 4 + int(own_name) * (NUM_SUMS - 4) // num_layers
        doubles = values.double()
        totals[index].append(rows @ (doubles @ columns))
        squares[index].append(rows.square() @ (doubles.square() @ columns.square()))
        sample = values.flatten()[:NUM_SAMPLES]
        halves = [sample.to(dtype).to(sample) for dtype in (torch.bfloat16, torch.float16)]
        are_rounded.append((sample == halves[0]).all() | (sample == halves[1]).all())

    fade_in: Any = encoder.fade_in
    if fade_in is not None:
        # A token that is faded in completely is an ordinary token, also in its sum.
        totals[2].append((1 - fade_in.get_values()).double().sum())
        squares[2].append(torch.ones_like(totals[2][-1]))

    # All of them at once, because a GPU has to be waited for.
    zero = totals[0][0] * 0
    rounded = torch.stack(are_rounded).all()
    sums = torch.stack([sum(each, zero) for each in (*totals, *squares, [rounded])]).cpu()
    rounding = HALF_ROUNDING if sums[-1] else ROUNDING
    return sums[:NUM_SUMS], rounding * sums[NUM_SUMS:-1].sqrt() + SUM_UNIT


def find_open_tokens(encoder: Any) -> dict[str, Tensor]:
    """Find the tokens that act on others: parameter -> [1, n, 1], False if it is hidden.

    CLS tokens are left out, because the statistics read them, also hidden ones.
    """
    if encoder.fade_in is None:
        return {}
    are_open = encoder.fade_in.progress > 0
    masks: dict[str, Tensor] = {}
    tokens = list_last_tokens(encoder.config, encoder.config.fading_tokens)
    for row, (group, index) in enumerate(tokens):
        if group != "cls":
            num_tokens = getattr(encoder.config, COUNT_FIELDS[group])
            mask = masks.setdefault(group, are_open.new_ones(1, num_tokens, 1))
            mask[:, index] = are_open[row]
    return {
        f"embeddings.{name}": masks[kind.group]
        for kind in TOKEN_KINDS
        if kind.group in masks
        for name in (kind.parameter, f"position_embeddings.{kind.group}")
    }


def list_effective_weights(encoder: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """List the weights that the features depend on, by name; layers with adapters of PEFT as merged."""
    unused: set[nn.Module] = set()
    for name, module in encoder.named_modules():
        if "modules_to_save" in module._modules:
            # PEFT stores copies that the forward pass does not use.
            wrapper: Any = module
            copies = {None: wrapper.original_module, **wrapper.modules_to_save}
            used = None if wrapper.disable_adapters else wrapper.active_adapters[0]
            unused.update(*(copies[adapter].modules() for adapter in copies if adapter != used))
        if name.startswith(("pooler", "fade_in")) or module in unused:
            continue
        weights: Any = module._parameters.items()
        if "base_layer" in module._modules:
            unused.update(module.modules())
            weights = merge_adapters(module).named_parameters()
        name = re.sub(r"\.(original_module|modules_to_save\.[^.]+)", "", name)
        for own_name, weight in weights:
            if weight is not None and own_name != "mask_token":
                yield f"{name}.{own_name}", weight


def merge_adapters(layer: Any) -> nn.Module:
    """Merge a copy of an adapter layer of PEFT, in float32, into the kind of layer that it wraps."""
    base = layer.get_base_layer()
    are_plain = all(type(weight) is nn.Parameter for weight in base.parameters())
    if not are_plain or not is_active_adapter(layer):
        return base
    merged = copy.deepcopy(layer).float()
    try:
        merged.merge()
    except NotImplementedError:
        return layer  # Its adapters count with their own parameters
    return merged.get_base_layer()


def is_active_adapter(module: Any) -> bool:
    """Tell whether an adapter layer of PEFT changes what the layer that it wraps computes."""
    return not (module.merged or module.disable_adapters)


def list_states(encoder: nn.Module) -> list[Any]:
    """List what changes with any edit of the weights, without reading them: 0.2 ms for 12 layers."""
    states: list[Any] = []
    modules: list[Any] = [encoder]
    while modules:  # `encoder.modules()` would take as long as all of this
        module = modules.pop()
        for weight in module._parameters.values():
            if weight is not None:
                states += read_state(weight)
        modules += filter(None, module._modules.values())  # Empty lists have no weights
        if "base_layer" in module._modules:
            states += [is_active_adapter(module), *module.active_adapters]
    return states


def read_state(weight: Tensor) -> tuple[Any, ...]:
    """Read the memory of a weight and the number of its edits."""
    if type(weight) not in (Tensor, nn.Parameter):
        return (id(weight),)
    # Tensors of inference mode do not count their edits, so each pass may have other ones.
    version = object() if weight.is_inference() else weight._version
    return weight.data_ptr(), version, weight.stride()
