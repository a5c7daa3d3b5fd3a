"""LoRA adapters without the base model, in PEFT's format: adapter_config.json and adapter_model.safetensors.

    write_adapter(Path("runs/mine/adapter"), state_dict, rank=8, base_model="someone/their-vit")

An adapter contains the LoRA matrices and complete copies of the other modules with trained parameters: the
classifiers, the pooler, the gates and the embeddings, which include the special tokens.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file

from ..hub.model_files import ADAPTER_WEIGHTS_FILE


# Modules whose parameters are stored in full in an adapter.
MODULES_TO_SAVE = ("vitcls.embeddings", "vitcls.gates", "vitcls.pooler", "classifier", "distillation_classifier")
# Default value of `target_modules` for LoRA: the query and value projections (Hu et al. 2021, arXiv 2106.09685).
LORA_TARGET_MODULES = r".*\.layers\.\d+\.attention\.[qv]_proj"  # the pattern excludes attention poolers


def write_adapter(folder: Path, state_dict: Mapping[str, torch.Tensor], rank: int, base_model: str) -> None:
    """Write the adapter of a model with LoRA layers.

    `state_dict` is the complete, unsharded state dict of a classifier with PEFT's LoRA layers. `base_model` is a Hub
    id or a folder.
    """
    from peft import LoraConfig

    folder.mkdir(parents=True, exist_ok=True)
    saved_modules = [module for module in MODULES_TO_SAVE if any(name.startswith(f"{module}.") for name in state_dict)]
    LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=LORA_TARGET_MODULES,
        modules_to_save=saved_modules,
        base_model_name_or_path=base_model,
        inference_mode=True,
    ).save_pretrained(str(folder))
    adapter_weights = {
        f"base_model.model.{name.replace('.default.', '.')}": weight.contiguous()
        for name, weight in state_dict.items()
        if ".lora_" in name or name.startswith(tuple(f"{module}." for module in saved_modules))
    }
    save_file(adapter_weights, folder / ADAPTER_WEIGHTS_FILE, metadata={"format": "pt"})
