"""Attention, statistics and diagnosis of special tokens.

    from modeling_vitcls.analysis import write_report
    write_report("report.html", model, processor, images)

    maps.py                 attention to patches as maps on the pixels of an image
    attribution.py          attention rollout and gradient attribution through all layers
    token_statistics.py     statistics over many images, per layer, head and token
    model_outputs.py        predictions or features that a model outputs for many images
    ablation.py             effects of tokens on outputs, with null distributions
    artifacts.py            patches with large norms
    diagnosis.py            verdicts as text, with measured values
    map_checks.py           checks whether rollout and attribution show what predictions depend on
    patch_features.py       patch features as colors (PCA), and similarity between all patches and one patch
    attention_recorder.py   attention of every layer of a forward pass
    model_utils.py          helpers that unwrap models and set evaluation mode
    image_report.py         predictions and maps of one image
    figures.py              figures of statistics, for reports and notebooks
    test_time_registers.py  neuron activations moved from patches to a register, without training
    inspection_inputs.py    images and labels of an inspection
    inspection.py           all measurements for a model and images
    report_data.py          an inspection as JSON values
    report.py               the HTML report
    inspect_tokens.py       the command `vitcls inspect`

A file is imported when one of its names in PUBLIC_NAMES is first used. Only the files that the demo imports are copied
to the Hub (listed in publishing/space.py).
"""

import importlib
from typing import Any


# File name without suffix -> public names in the file.
PUBLIC_NAMES = {
    "ablation": ("Effect", "compute_ablations"),
    "artifacts": ("PatchDiagnosis", "SecondMode", "find_second_mode"),
    "attribution": ("compute_attention_rollout", "compute_attribution"),
    "diagnosis": ("Verdict", "diagnose_tokens"),
    "figures": (
        "CURVES",
        "GROUP_COLORS",
        "plot_curve",
        "plot_map_checks",
        "plot_norm_histogram",
        "plot_norms",
        "render_svg",
    ),
    "image_report": ("ImageReport", "build_image_report"),
    "inspection": ("Inspection", "inspect_model"),
    "map_checks": ("MapCheck", "check_maps"),
    "maps": ("extract_patch_maps", "overlay", "upsample_maps"),
    "patch_features": (
        "compute_patch_colors",
        "compute_patch_features",
        "compute_patch_similarity",
        "draw_patch_colors",
    ),
    "report": ("write_json_values", "write_page", "write_report"),
    "token_statistics": ("Findings", "TokenStatistics"),
}
FILES_BY_NAME = {name: file for file, names in PUBLIC_NAMES.items() for name in names}

__all__ = sorted(FILES_BY_NAME)  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    """Import and return the public object `name`."""
    if name not in FILES_BY_NAME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{FILES_BY_NAME[name]}", __name__), name)


def __dir__() -> list[str]:
    """Return all names, for completion in editors and shells."""
    return sorted({*globals(), *FILES_BY_NAME})
