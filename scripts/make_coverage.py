"""Measure which plain ViTs of timm and transformers convert exactly, and write the table in docs/coverage.md.

    python scripts/make_coverage.py                       # docs/coverage.md
    python scripts/make_coverage.py --output other.md

Every architecture is built with random weights and two layers, converted, and compared at two image sizes. An
architecture is exact if all tokens and logits differ by at most 1e-5 in float32. The reason for any other architecture
is the error message of the conversion.
"""

import argparse
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import timm
import torch
import transformers
from torch import nn
from transformers import CONFIG_MAPPING, MODEL_MAPPING
from transformers.utils import logging

from modeling_vitcls.conversion.from_timm import convert_from_timm
from modeling_vitcls.conversion.from_transformers import CONVERTIBLE_CLASSES
from modeling_vitcls.conversion.parity_report import compare_models
from modeling_vitcls.conversion.random_weights import randomize_weights
from modeling_vitcls.conversion.source_models import TimmSource, TransformersSource
from modeling_vitcls.conversion.weight_rules import ConversionError


OUTPUT = Path(__file__).parents[1] / "docs" / "coverage.md"
# Modules of timm whose models have one resolution and attention among all patches.
TIMM_MODULES = (
    "vision_transformer",
    "deit",
    "eva",
    "beit",
    "vision_transformer_relpos",
    "naflexvit",
    "cait",
    "convit",
    "deepseek_vit",
    "gemma4_vit",
    "qwen3_vit",
)
GRID = (4, 4)  # patches of the native size
SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "patch_size": 8,
    "image_size": 32,
    "mlp_ratio": 2,
    "num_patches": 16,
    "max_img_size": 64,
    "mask_ratio": 0.0,
}
HEADER = """# Coverage of other projects' ViTs

`python scripts/make_coverage.py` writes this page. It builds every architecture with random weights and two layers,
converts it, and compares all tokens and logits at the native size and at a rectangle in float32 (limit 1e-5). timm
{timm}, transformers {transformers}.

"""


def main() -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    output = parser.parse_args().output
    logging.set_verbosity_error()
    text = HEADER.format(timm=timm.__version__, transformers=transformers.__version__)
    output.write_text(text + "\n".join([*format_timm(), "", *format_transformers()]) + "\n", encoding="utf-8")


# timm ----------------------------------------------------------------------------------------------------------------


def format_timm() -> Iterator[str]:
    """Yield the lines of timm's section."""
    results = {module: [measure_timm(name) for name in timm.list_models(module=module)] for module in TIMM_MODULES}
    exact = [difference for rows in results.values() for difference, _ in rows if difference is not None]
    yield "## timm"
    yield ""
    yield (
        f"{len(exact)} of {sum(map(len, results.values()))} architectures are exact. The largest difference is "
        f"{max(exact):.1e}."
    )
    yield ""
    yield "| module | architectures | exact | others |"
    yield "|---|---:|---:|---|"
    for module, rows in results.items():
        reasons = Counter(reason for _, reason in rows if reason)
        num_exact = len(rows) - sum(reasons.values())
        others = "; ".join(f"{reason} ({count})" for reason, count in reasons.most_common())
        yield f"| `{module}` | {len(rows)} | {num_exact} | {others} |"


@torch.no_grad()
def measure_timm(name: str) -> tuple[float | None, str]:
    """Return the largest difference of an architecture and "", or None and the reason."""
    try:
        model = build_timm(name)
        converted = convert_from_timm(model)
        comparisons, reason = compare_models(TimmSource(f"timm:{name}", model, None, []), converted, with_logits=True)
    except ConversionError as error:
        return None, shorten(str(error))
    except Exception as error:  # modules that the conversion was not written for may fail in any way
        return None, shorten(f"{type(error).__name__}: {error}")
    difference = max(difference for comparison in comparisons for difference in comparison.differences.values())
    return (None, shorten(reason)) if reason else (difference, "")


def build_timm(name: str) -> Any:
    """Build an architecture with two blocks, its own width up to 1024, and random values."""
    original: Any = timm.create_model(name, device="meta")
    num_heads = next((module.num_heads for module in original.modules() if hasattr(module, "num_heads")), 1)
    width = getattr(original, "embed_dim", 0) or original.num_features
    options: dict[str, Any] = {"depth": 2, "num_classes": 7}
    if width > 1024:
        options |= {"embed_dim": 8 * width // num_heads, "num_heads": 8}
    if "sapiens2" in name:  # by default one value per block of the full depth
        heads = options.get("num_heads", num_heads)
        options["num_kv_heads"] = (heads, heads // 2)
    try:
        model: Any = timm.create_model(name, **options)
        height, width = model.patch_embed.patch_size
        model.set_input_size(img_size=(GRID[0] * height, GRID[1] * width))
    except (TypeError, AttributeError):  # an architecture without these arguments
        model = original
        convert_from_timm(model)  # raises the reason
    randomize_weights(model)
    return model


# transformers --------------------------------------------------------------------------------------------------------


def format_transformers() -> Iterator[str]:
    """Yield the lines of the section of transformers."""
    exact, reasons = {}, defaultdict(list)
    for name in list_vision_classes():
        difference, reason = measure_transformers(name)
        if difference is None:
            reasons[reason].append(name)
        else:
            exact[name] = difference
    total = len(exact) + sum(map(len, reasons.values()))
    yield "## transformers"
    yield ""
    yield (
        "Base models of images with a patch size, a hidden size and layers in their configuration, and the classes "
        f"that can be converted: {len(exact)} of {total} are exact. "
        f"The largest difference is {max(exact.values()):.1e}."
    )
    yield ""
    yield "| result | classes |"
    yield "|---|---|"
    yield f"| exact | {', '.join(f'`{name}`' for name in sorted(exact))} |"
    for reason, names in sorted(reasons.items()):
        yield f"| {reason} | {', '.join(f'`{name}`' for name in sorted(names))} |"


def list_vision_classes() -> list[str]:
    """Return the names of the convertible classes, and of all other base models of images."""
    names = dict.fromkeys(CONVERTIBLE_CLASSES)
    for config_class in CONFIG_MAPPING.values():
        try:
            config, model_class = config_class(), MODEL_MAPPING[config_class]
        except Exception:  # a configuration without defaults, or without a base model
            continue
        has_fields = all(hasattr(config, field) for field in ("patch_size", "hidden_size", "num_hidden_layers"))
        if has_fields and getattr(model_class, "main_input_name", "") == "pixel_values":
            names[model_class.__name__] = None
    return list(names)


@torch.no_grad()
def measure_transformers(name: str) -> tuple[float | None, str]:
    """Return the largest difference of a class and "", or None and the reason."""
    model_class = getattr(transformers, name)
    config_class = model_class.config_class
    if name not in CONVERTIBLE_CLASSES:
        return None, describe_class(model_class, config_class())
    try:
        model = randomize_weights(model_class(build_config(config_class)))
        source = TransformersSource("small", ".", model, [])
        converted = source.convert("keep", None)
        comparisons, _ = compare_models(source, converted, with_logits=source.has_classifier)
    except ConversionError as error:
        return None, shorten(str(error))
    return max(value for comparison in comparisons for value in comparison.differences.values()), ""


def build_config(config_class: Any) -> Any:
    """Build a small configuration, also of its vision part."""
    default = config_class()
    if hasattr(default, "vision_config"):
        return config_class(vision_config=build_config(type(default.vision_config)).to_dict())
    fields = {name: value for name, value in SMALL.items() if hasattr(default, name)}
    if hasattr(default, "summary_idxs"):
        fields |= {"num_cls_tokens": 3, "num_registers": 2, "summary_idxs": [2, 0]}
    return config_class(**fields)


def describe_class(model_class: Any, config: Any) -> str:
    """Return why a class of transformers cannot be converted, from its modules."""
    try:
        with torch.device("meta"):
            model = model_class(config)
    except Exception as error:
        return shorten(f"cannot be built without arguments: {type(error).__name__}")
    names = {type(module).__name__ for module in model.modules()}
    if any(isinstance(module, nn.Conv3d) for module in model.modules()):
        return "not a plain ViT: patches of several frames"
    if any(getattr(config, field, None) for field in ("window_size", "depths", "global_attn_indexes")):
        return "not a plain ViT: windows or several resolutions"
    if any("Decoder" in name or "Text" in name for name in names) or hasattr(config, "text_config"):
        return "not a plain ViT: a decoder or a text model next to the image encoder"
    if any("Rotary" in name for name in names):
        return "no rules: rotary positions of another kind"
    return "no rules for this class"


def shorten(text: str) -> str:
    """Return the first clause of a message for a table cell."""
    return " ".join(text.split())[:160].replace("|", "\\|")


if __name__ == "__main__":
    main()
