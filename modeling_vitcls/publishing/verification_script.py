"""Load a published model in a process without this package, and save its outputs for fixed inputs.

    python -P verification_script.py SOURCE COMMIT AUTO_CLASS TRUST_REMOTE_CODE NUM_THREADS FOLDER

verify.py runs the script.

The script writes outputs.safetensors and report.json with the loaded classes to FOLDER; report.json
contains only the error if loading fails. The code of the repository runs only in this process. The
script imports torch, transformers and other libraries, but not this package.
"""

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor
from transformers.dynamic_module_utils import get_class_from_dynamic_module


Outputs = dict[str, Tensor]


def collect_outputs(
    source: str, complete_class: str, options: dict[str, Any], backbone_class: Any = None
) -> tuple[Outputs, dict[str, Any]]:
    """Process a fixed image and compute the outputs of the encoder and of the complete model.

    Args:
        source: Id of a repository, or a folder.
        complete_class: Auto class that loads the complete model. AutoModel loads the encoder of any
            checkpoint.
        options: Arguments of `from_pretrained`: the revision, and whether to trust the code of the
            repository.
        backbone_class: Class that loads a backbone in a folder, which AutoBackbone cannot. Default:
            the class in the folder.

    Returns:
        The outputs in float32 by name, such as `{"AutoModel/last_hidden_state": ...}`, and a report
        with the names of the loaded classes and of the weights that the checkpoint lacks.
    """
    config = transformers.AutoConfig.from_pretrained(source, **options)
    size = config.image_size
    height, width = (size, size) if isinstance(size, int) else size
    generator = torch.Generator().manual_seed(0)
    pixel_values = torch.randn(2, config.num_channels, height, width, generator=generator)

    outputs: Outputs = {}
    report: dict[str, Any] = {"classes": {}, "missing": []}

    processor_file = transformers.utils.cached_file(
        source,
        "preprocessor_config.json",
        revision=options.get("revision"),
        _raise_exceptions_for_missing_entries=False,
    )
    if processor_file is not None:
        processor = transformers.AutoImageProcessor.from_pretrained(source, **options)
        # The image is neither square nor of the target size, so resizing and cropping are part of
        # the comparison.
        num_channels = 3 if processor.do_convert_rgb else config.num_channels
        shape = (num_channels, height * 5 // 4 + 1, width * 3 // 2 + 1)
        image = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
        pixel_values = processor(image, return_tensors="pt")["pixel_values"]
        outputs["AutoImageProcessor/pixel_values"] = pixel_values
        report["classes"]["AutoImageProcessor"] = type(processor).__name__

    architecture = (config.architectures or ["ViTCLSModel"])[0]
    for auto_class in dict.fromkeys(["AutoModel", complete_class]):
        # Weights that the checkpoint lacks are random. With one seed, both processes have the same
        # ones.
        torch.manual_seed(0)
        model_class = getattr(transformers, auto_class)
        if auto_class == "AutoBackbone" and Path(source).is_dir():
            model_class = backbone_class or get_class_from_dynamic_module(
                config.auto_map[auto_class], source
            )
        model, info = model_class.from_pretrained(
            source, dtype=torch.float32, output_loading_info=True, **options
        )
        report["classes"][auto_class] = type(model).__name__
        # Other classes may have a head that the checkpoint lacks.
        if type(model).__name__ == architecture:
            report["missing"] = sorted(info["missing_keys"])

        with torch.inference_mode():
            model_output = model.eval()(pixel_values)
        outputs |= {
            f"{auto_class}/{name}": tensor for name, tensor in flatten_outputs(model_output)
        }

    # safetensors refuses tensors that share memory, such as two views of one output.
    return {name: tensor.detach().clone().contiguous() for name, tensor in outputs.items()}, report


def flatten_outputs(outputs: Any, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors in nested dicts and tuples, with names such as `logits.species`."""
    named_values = outputs.items() if isinstance(outputs, Mapping) else enumerate(outputs)
    for name, value in named_values:
        if isinstance(value, Tensor):
            if value.numel():  # A group without tokens has nothing to compare
                yield f"{prefix}{name}", value
        elif isinstance(value, Mapping | tuple | list):
            yield from flatten_outputs(value, f"{prefix}{name}.")


if __name__ == "__main__":
    # Importing the package fails, as if it were not installed.
    sys.modules["modeling_vitcls"] = None  # type: ignore[assignment]
    _, source_name, commit, auto_class, trust_text, thread_text, target = sys.argv
    # The reference was computed with this number of threads, which affects rounding.
    torch.set_num_threads(int(thread_text))
    loading = {"revision": commit, "trust_remote_code": trust_text == "True"}
    try:
        tensors, result = collect_outputs(source_name, auto_class, loading)
        save_file(tensors, Path(target, "outputs.safetensors"))
    except Exception as error:  # Published code may raise any error
        result = {"error": f"{type(error).__name__}: {' '.join(str(error).split())}"}
    Path(target, "report.json").write_text(json.dumps(result), encoding="utf-8")
