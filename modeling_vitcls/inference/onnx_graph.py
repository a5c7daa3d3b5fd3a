"""Run the ONNX files of `vitcls export` on the CPU, with onnxruntime.

outputs = OnnxGraph(Path("model.onnx"), config)(pixel_values)                  # {"logits": [B, labels], ...}
logits = OnnxClassifier(Path("model.onnx"), config)(pixel_values).logits       # as of the classifier itself
"""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..data.labels import get_heads
from ..model.configuration_vitcls import ViTCLSConfig
from ..model.modeling_vitcls import ViTCLSImageClassifierOutput
from ..runtime.errors import describe_installation, format_error


INPUT_NAME = "pixel_values"


class OnnxGraph(nn.Module):
    """An ONNX file. It runs in as many threads as PyTorch.

    Args:
        file: The file.
        config: Configuration of the model that was exported.

    Raises:
        ValueError: If onnxruntime is not installed, or cannot read the file.
    """

    dtype = torch.float32  # The dtype of images
    device = torch.device("cpu")  # That computes; images may be on another device

    def __init__(self, file: Path, config: ViTCLSConfig) -> None:
        super().__init__()
        self.file = file
        self.config = config
        try:
            import onnxruntime

            options = onnxruntime.SessionOptions()
            # A launcher limits PyTorch's threads if several processes share the machine.
            options.intra_op_num_threads = torch.get_num_threads()
            options.log_severity_level = 3  # Log only errors
            self.session = onnxruntime.InferenceSession(
                str(file), options, providers=["CPUExecutionProvider"]
            )
        except ImportError as error:
            raise ValueError(
                f"{file} requires {error.name}. {describe_installation('export')}"
            ) from error
        except Exception as error:  # The exceptions of onnxruntime are not documented.
            raise ValueError(f"{file} cannot be read: {format_error(error)}") from error

    def forward(self, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
        """Compute the outputs [B, ...] by name, for images [B, C, H, W].

        Raises:
            ValueError: If the graph does not support the images.
        """
        names = [output.name for output in self.session.get_outputs()]
        try:
            arrays = self.session.run(names, {INPUT_NAME: pixel_values.float().cpu().numpy()})
        except Exception as error:  # The exceptions of onnxruntime are not documented.
            raise ValueError(
                f"{self.file} cannot be run on images of shape {list(pixel_values.shape)}: "
                f"{format_error(error)}"
            ) from error
        return {
            name: torch.from_numpy(array).to(pixel_values.device)
            for name, array in zip(names, arrays, strict=True)
        }


class OnnxClassifier(OnnxGraph):
    """The graph of a classifier, with the outputs that an `Evaluator` reads.

    Raises:
        ValueError: As `OnnxGraph`, or if the graph does not have the labels of the configuration.
    """

    def __init__(self, file: Path, config: ViTCLSConfig) -> None:
        super().__init__(file, config)
        shapes = {output.name: output.shape for output in self.session.get_outputs()}
        for task, head in get_heads(config).items():
            name = task or "logits"
            if name not in shapes or shapes[name][-1] != len(head.labels):
                raise ValueError(
                    f"{file} requires an output {name} with {len(head.labels)} labels, as in "
                    f"config.json, but has the outputs {shapes}. Export the model again"
                )

    def forward(self, pixel_values: torch.Tensor) -> Any:
        """Compute the logits for images [B, C, H, W], as the classifier returns them."""
        outputs = super().forward(pixel_values)
        logits: Any = outputs if self.config.tasks else outputs["logits"]
        return ViTCLSImageClassifierOutput(
            logits=logits,
            cls_logits=outputs.get("cls_logits"),
            distillation_logits=outputs.get("distillation_logits"),
            task_logits=outputs,
        )
