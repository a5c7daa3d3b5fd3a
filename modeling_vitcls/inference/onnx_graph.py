"""Run the ONNX files of `vitcls export` on the CPU, with onnxruntime.

outputs = OnnxGraph(Path("model.onnx"), config)(pixel_values)                  # {"logits": [B, labels], ...}
"""

from pathlib import Path

import torch
from torch import nn

from ..model.configuration_vitcls import ViTCLSConfig
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
