"""Determine which plain ViTs convert exactly, and write the tables of docs/converting.md.

    python scripts/tools/make_coverage.py

Every architecture is built with random weights and two layers, converted, and compared with the
converted model at two image sizes. An architecture converts exactly if all tokens and logits of the
two models differ by at most 1e-5 in float32. For other architectures of timm, the table lists the
error message of the conversion.
"""

from collections import Counter
from pathlib import Path
from typing import Any

import timm
import torch
import transformers
from random_weights import randomize_weights
from transformers.utils import logging

from modeling_vitcls.conversion.from_timm import TIMM_CLASSES, convert_timm_model
from modeling_vitcls.conversion.from_transformers import CONVERTIBLE_CLASSES
from modeling_vitcls.conversion.parity_report import compare_models
from modeling_vitcls.conversion.source_models import TimmSource, TransformersSource
from modeling_vitcls.conversion.timm_modules import get_class_name
from modeling_vitcls.conversion.weight_rules import ConversionError


PAGE = Path(__file__).parents[2] / "docs" / "converting.md"
MARKS = (
    "<!-- coverage: from here on, scripts/tools/make_coverage.py writes -->\n",
    "<!-- end of coverage -->\n",
)
# timm modules whose models have a single resolution and global attention.
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
GRID_SIZE = (4, 4)  # native size in patches
SMALL_CONFIG = {
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
# Features of timm's models that ViTCLS or the converter does not support, keyed by class name.
UNSUPPORTED_FEATURES = {
    "Beit": (
        "timm resamples position biases at unevenly spaced points; BEiT converts exactly from "
        "`transformers:`"
    ),
    "VisionTransformerRelPos": "position biases are computed by an MLP, or resampled as in `Beit`",
    "NaFlexVit": (
        "one module embeds patches, tokens and positions, and also packs the patches of several "
        "images"
    ),
    "Cait": "talking-heads attention and separate layers for the CLS token",
    "ConVit": "gated positional self-attention",
    "DeepseekVitClassifier": "the converter has no rules for an encoder in a submodule",
    "DeepseekVitEncoder": "a projector that merges patches",
    **dict.fromkeys(("Gemma4VitClassifier", "Gemma4VitEncoder"), "four norms per block"),
    **dict.fromkeys(
        ("Qwen3VitClassifier", "Qwen3VitEncoder"),
        "position embeddings are resampled with aligned corners",
    ),
}


def main() -> None:
    """Write the tables between the marks of docs/converting.md."""
    logging.set_verbosity_error()
    start, _, rest = PAGE.read_text(encoding="utf-8").partition(MARKS[0])
    tables = f"\n{format_timm_section()}\n\n{format_transformers_section()}\n\n"
    end = rest.partition(MARKS[1])[2]
    PAGE.write_text(f"{start}{MARKS[0]}{tables}{MARKS[1]}{end}", encoding="utf-8")


# timm ---------------------------------------------------------------------------------------------


def format_timm_section() -> str:
    """Return the section about timm."""
    results = {
        module: [measure_timm_model(name) for name in timm.list_models(module=module)]
        for module in TIMM_MODULES
    }
    exact_differences = [
        difference for rows in results.values() for difference, _ in rows if difference is not None
    ]
    lines = [
        f"### timm {timm.__version__}\n",
        f"{len(exact_differences)} of {sum(map(len, results.values()))} architectures convert "
        f"exactly. The largest difference is {max(exact_differences):.1e}.\n",
        "| module | architectures | exact | reasons for inexact conversions |",
        "|---|---:|---:|---|",
    ]
    for module, rows in results.items():
        reason_counts = Counter(reason for _, reason in rows if reason)
        num_exact = len(rows) - sum(reason_counts.values())
        reason_text = "; ".join(
            f"{reason} ({count})" for reason, count in reason_counts.most_common()
        )
        lines.append(f"| `{module}` | {len(rows)} | {num_exact} | {reason_text} |")
    return "\n".join(lines)


@torch.no_grad()
def measure_timm_model(name: str) -> tuple[float | None, str]:
    """Return the largest difference between an architecture and the converted model, and "".

    If the conversion is not exact, return None and the reason.
    """
    try:
        model = build_timm_model(name)
        converted_model = convert_timm_model(model)
        comparisons, reason = compare_models(
            TimmSource(f"timm:{name}", model, None, []), converted_model
        )
    except ConversionError as error:
        return None, shorten_message(str(error))
    except Exception as error:  # unsupported modules may raise any exception
        return None, shorten_message(f"{type(error).__name__}: {error}")
    difference = max(max(each["differences"].values()) for each in comparisons)
    return (None, shorten_message(reason)) if reason else (difference, "")


def build_timm_model(name: str) -> Any:
    """Build an architecture with two blocks, six heads of the original size and random values.

    Raises:
        ConversionError: If the class of the model is not supported.
    """
    options: dict[str, Any] = {"depth": 2, "num_classes": 7}
    try:
        original_model: Any = timm.create_model(name, device="meta", **options)
    except (TypeError, AssertionError):
        # an architecture that has no such arguments, or requires one value per block
        original_model = timm.create_model(name, device="meta")
    if get_class_name(original_model) not in TIMM_CLASSES:
        class_name = get_class_name(original_model)
        raise ConversionError(
            f"{class_name} is not supported: {UNSUPPORTED_FEATURES.get(class_name, 'no rules')}"
        )
    num_heads = next(
        module.num_heads for module in original_model.modules() if hasattr(module, "num_heads")
    )
    options |= {"embed_dim": 6 * original_model.embed_dim // num_heads, "num_heads": 6}
    if "sapiens2" in name:  # the default has one value for each block of the full depth
        options["num_kv_heads"] = (6, 3)
    model: Any = timm.create_model(name, **options)
    height, width = model.patch_embed.patch_size
    model.set_input_size(img_size=(GRID_SIZE[0] * height, GRID_SIZE[1] * width))
    return randomize_weights(model)


# transformers -------------------------------------------------------------------------------------


def format_transformers_section() -> str:
    """Return the section about transformers, whose convertible classes must all be exact."""
    differences = {name: measure_transformers_class(name) for name in CONVERTIBLE_CLASSES}
    names = ", ".join(f"`{name}`" for name in sorted(differences))
    return (
        f"### transformers {transformers.__version__}\n\n{len(differences)} classes convert exactly. "
        f"The largest difference is {max(differences.values()):.1e}.\n\n{names}"
    )


@torch.no_grad()
def measure_transformers_class(name: str) -> float:
    """Return the largest difference between a small model of a class and the converted model."""
    model_class = getattr(transformers, name)
    model = randomize_weights(model_class(build_config(model_class.config_class)))
    source = TransformersSource("small", ".", model, [])
    comparisons, _ = compare_models(source, source.convert())
    return max(max(each["differences"].values()) for each in comparisons)


def build_config(config_class: Any) -> Any:
    """Build a small configuration, with a small vision configuration if there is one."""
    default_config = config_class()
    if hasattr(default_config, "vision_config"):
        return config_class(
            vision_config=build_config(type(default_config.vision_config)).to_dict()
        )
    fields: dict[str, Any] = {
        name: value for name, value in SMALL_CONFIG.items() if hasattr(default_config, name)
    }
    if isinstance(getattr(default_config, "mlp_ratio", None), float):
        fields["mlp_ratio"] = float(SMALL_CONFIG["mlp_ratio"])
    if hasattr(default_config, "summary_idxs"):
        fields |= {"num_cls_tokens": 3, "num_registers": 2, "summary_idxs": [2, 0]}
    return config_class(**fields)


def shorten_message(text: str) -> str:
    """Return the first 160 characters of a message, escaped for a table cell."""
    return " ".join(text.split())[:160].replace("|", "\\|")


if __name__ == "__main__":
    main()
