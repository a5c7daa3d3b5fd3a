"""LoRA adapters without the base model, in PEFT's format: adapter_config.json, adapter_model.safetensors and card.

    write_adapter(Path("runs/mine/adapter"), state_dict, config, rank=8, base_model="someone/their-vit")
    vitcls push --model runs/mine/adapter --hub-model-id me/my-adapter

    base = AutoModelForImageClassification.from_pretrained("someone/their-vit", num_labels=10, trust_remote_code=True)
    model = PeftModel.from_pretrained(base, "me/my-adapter")

An adapter contains the LoRA matrices and complete copies of the other modules with trained parameters: the
classifiers, the pooler, the gates and the embeddings, which include the special tokens.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from huggingface_hub import ModelCard, ModelCardData
from safetensors.torch import save_file

from ..configuration_vitcls import COUNT_FIELDS, ViTCLSConfig
from ..files import read_json
from ..hub.local_paths import is_local, strip_folders
from ..hub.provenance import CARD_FILE, DERIVED_WEIGHTS_TEXTS, LICENSE_PATTERNS, Provenance, WeightsLicense
from .card_sections import CITATION, render_card


ADAPTER_CONFIG_FILE = "adapter_config.json"
ADAPTER_WEIGHTS_FILE = "adapter_model.safetensors"
ADAPTER_PATTERNS = (ADAPTER_CONFIG_FILE, ADAPTER_WEIGHTS_FILE, CARD_FILE, *LICENSE_PATTERNS)
# Modules whose parameters are stored in full in an adapter.
MODULES_TO_SAVE = ("vitcls.embeddings", "vitcls.gates", "vitcls.pooler", "classifier", "distillation_classifier")
# Default value of `target_modules` for LoRA: the query and value projections (Hu et al. 2021, arXiv 2106.09685).
LORA_TARGET_MODULES = r".*\.layers\.\d+\.attention\.[qv]_proj"  # the pattern excludes attention poolers


def write_adapter(
    folder: Path,
    state_dict: Mapping[str, torch.Tensor],
    config: ViTCLSConfig,
    rank: int,
    base_model: str,
    provenance: Provenance | None = None,
) -> None:
    """Write the adapter of a model with LoRA layers and the card of the adapter.

    `state_dict` is the complete, unsharded state dict of a classifier with PEFT's LoRA layers. `base_model` is a Hub
    id or a folder, and `provenance` is the provenance of the base model.
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
    build_adapter_card(folder.resolve().name, config, rank, base_model, provenance).save(folder / CARD_FILE)
    if provenance is not None:
        provenance.copy_license(folder)


def build_adapter_card(
    name: str, config: ViTCLSConfig, rank: int, base_model: str, provenance: Provenance | None
) -> ModelCard:
    """Build the card of an adapter. `name` is the folder name, which a push replaces with the repository id."""
    weights_license = WeightsLicense(DERIVED_WEIGHTS_TEXTS, provenance, has_code=False)
    loading_arguments = {"num_labels": config.num_labels, "image_size": config.image_size}
    loading_arguments |= {field: getattr(config, field) for field in COUNT_FIELDS.values()}
    card_data = ModelCardData(
        base_model=None if is_local(base_model) else base_model,
        base_model_relation=None if is_local(base_model) else "adapter",
        library_name="peft",
        pipeline_tag="image-classification",
        tags=["vision", "vit", "vitcls", "lora"],
        **weights_license.metadata,
    )
    return render_card(
        "adapter",
        card_data,
        name=name,
        rank=rank,
        base_model=strip_folders(base_model),
        arguments=", ".join(f"{field}={value!r}" for field, value in loading_arguments.items()),
        citation=CITATION,
        license_text=weights_license,
    )


def is_adapter(folder: Path) -> bool:
    """Return whether a folder contains a PEFT adapter."""
    return (folder / ADAPTER_CONFIG_FILE).is_file()


def check_adapter(folder: Path) -> None:
    """Raise ValueError if an adapter is incomplete, or if its base model is missing or is a local path."""
    if not (folder / ADAPTER_WEIGHTS_FILE).is_file():
        raise ValueError(f"{folder} lacks {ADAPTER_WEIGHTS_FILE}. Save the adapter again")
    base_model = read_json(folder / ADAPTER_CONFIG_FILE).get("base_model_name_or_path")
    if not base_model or is_local(base_model):
        raise ValueError(
            f"the adapter in {folder} requires a base model on the Hub, but its base model is {base_model!r}. Push "
            f"the base model, and set base_model_name_or_path in {ADAPTER_CONFIG_FILE} to its Hub id"
        )
