"""The pipelines of transformers, as fast as `vitcls predict`: packed weights, and its precision.

    pipeline("image-classification", "runs/mine")                           bf16 where `predict` uses it
    pipeline("image-classification", "runs/mine", mixed_precision="no")     float32

`import modeling_vitcls` registers them. With other models, they do what they did.
"""

from contextlib import nullcontext
from typing import Any

from transformers.pipelines import PIPELINE_REGISTRY

from ..model.modeling_vitcls import ViTCLSPreTrainedModel
from ..model.pipeline_vitcls import PIPELINES
from ..speed.lean_layers import use_fast_modules


class FastPipeline:
    """Freezes the weights of the model, and computes in the precision of `vitcls predict`."""

    model: Any
    device: Any

    def __init__(self, *args: Any, mixed_precision: str = "auto", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.autocast: Any = nullcontext
        if isinstance(self.model, ViTCLSPreTrainedModel):
            # imported here, because Accelerate takes a while, and this file is imported with the package
            from ..runtime.distributed import build_autocast

            use_fast_modules(self.model, packed=True)
            self.autocast = build_autocast(mixed_precision, self.device, self.model.config)

    def _forward(self, model_inputs: Any) -> Any:
        with self.autocast():
            return super()._forward(model_inputs)  # type: ignore[misc]


def register_pipelines() -> None:
    """Register a fast pipeline in place of each one of a folder's code."""
    for task, plain_class in PIPELINES.items():
        fast_class = type(plain_class.__name__, (FastPipeline, plain_class), {})
        PIPELINE_REGISTRY.supported_tasks[task] |= {"impl": fast_class}
