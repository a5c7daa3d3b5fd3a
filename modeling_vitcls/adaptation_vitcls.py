"""Checkpoints loaded with other sizes than they were saved with.

    model = ViTCLSModel.from_pretrained(path, image_size=[256, 384])    # at load
    model = model.adapted(image_size=[256, 384])                        # on a loaded model

What was done is logged once, line by line. Nothing here needs training; whether the model should be fine-tuned
afterwards is the user's call.
"""

import copy
from collections.abc import Callable
from typing import Any, Self

import torch
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import logging

from .configuration_vitcls import ADAPTABLE_FIELDS, ViTCLSConfig
from .embeddings_vitcls import Resampling
from .loading_vitcls import load_checkpoint


logger = logging.get_logger(__name__)


class AdaptableModel(PreTrainedModel):
    """A `PreTrainedModel` whose `from_pretrained` adapts, with `adapted` for loaded models."""

    config: ViTCLSConfig

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *model_args: Any, **kwargs: Any) -> Any:
        """As `PreTrainedModel.from_pretrained`; `image_size` other than the checkpoint's resamples the positions.

        Raises:
            OSError, RuntimeError: in one line, for a checkpoint that is missing or damaged, or does not fit.
        """
        wanted = {name: kwargs.pop(name) for name in ADAPTABLE_FIELDS if name in kwargs}
        if isinstance(config := kwargs.get("config"), ViTCLSConfig) and config.stored_values:
            # The Auto classes have put the wanted values into the configuration: load with the stored ones first.
            wanted = {name: getattr(config, name) for name in config.stored_values} | wanted
            kwargs["config"] = changed_config(config, config.stored_values)
        loaded = load_checkpoint(super().from_pretrained, pretrained_model_name_or_path, *model_args, **kwargs)
        if not wanted:
            return loaded
        if isinstance(loaded, tuple):  # output_loading_info=True
            return loaded[0].adapted(**wanted), *loaded[1:]
        return loaded.adapted(**wanted)

    def adapted(self, **wanted: Any) -> Self:
        """A model with other values of `ADAPTABLE_FIELDS` and these weights; itself where nothing changes.

        Raises:
            ValueError: for a field that cannot be adapted, or a value that does not fit the others.
        """
        if unknown := sorted(set(wanted) - set(ADAPTABLE_FIELDS)):
            raise ValueError(f"{unknown[0]} cannot be adapted: {', '.join(ADAPTABLE_FIELDS)} can")
        config = changed_config(self.config, wanted)
        if config.grid_size == self.config.grid_size and config.token_layout == self.config.token_layout:
            self.config = config
            return self
        model = self.rebuilt(config).train(self.training)
        model.to(device=self.device, dtype=self.dtype)  # type: ignore[call-arg]  # transformers wraps `to` untyped
        transfer(self, model)
        return model

    def rebuilt(self, config: ViTCLSConfig) -> Self:
        """A model of this class with fresh weights, for another configuration."""
        return type(self)(config)


@torch.no_grad()
def transfer(source: AdaptableModel, target: AdaptableModel) -> None:
    """Copy every weight of `source` into `target`, adapted by `ADAPTERS` where shapes differ, and log what changed."""
    weights = source.state_dict()
    for name, weight in target.state_dict().items():
        old = weights[name]
        if old.shape != weight.shape:
            adapt = next(adapt for suffix, adapt in ADAPTERS.items() if name.endswith(suffix))
            old, what = adapt(old, source.config, target.config)
            logger.warning(f"{name}: {what}")
        weight.copy_(old)


def adapt_patch_positions(positions: torch.Tensor, old: ViTCLSConfig, new: ViTCLSConfig) -> tuple[torch.Tensor, str]:
    """Resample learned positions [1, rows * columns, D] to the new grid."""
    resample = Resampling(new.position_interpolation, new.position_antialias, new.position_offset)
    resampled = resample(positions, old.grid_size, new.grid_size)
    (rows, columns), (new_rows, new_columns) = old.grid_size, new.grid_size
    return resampled, f"resampled from {rows} x {columns} to {new_rows} x {new_columns} patches"


# End of a parameter's name -> how it follows the configuration.
ADAPTERS: dict[str, Callable[[torch.Tensor, ViTCLSConfig, ViTCLSConfig], tuple[torch.Tensor, str]]] = {
    "position_embeddings.patches": adapt_patch_positions,
}


def changed_config(config: ViTCLSConfig, values: dict[str, Any]) -> ViTCLSConfig:
    """A copy with other values, checked as at construction."""
    config = copy.deepcopy(config)
    for name, value in values.items():
        setattr(config, name, value)
    config.stored_values = {}
    config.validate()
    return config
