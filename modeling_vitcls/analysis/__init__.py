"""Attention, statistics and diagnosis of special tokens.

    from modeling_vitcls.analysis import write_report
    write_report("report.html", model, processor, images)

    maps.py                 attention to patches as maps on the pixels of an image
    attribution.py          attention rollout and gradient attribution through all layers
    token_statistics.py     statistics over many images, per layer, head and token
    ablation.py             effect of each token on predictions
    diagnosis.py            findings in words, with their numbers
    attention_recorder.py   attention of every layer of a forward pass
    model_utils.py          unwrap models; evaluation mode
    image_report.py         one image: prediction and maps
    figures.py              figures of tokens and predictions, for cards, notebooks and trackers
    figures_over_depth.py   curves over layers
    figures_of_states.py    similarities, norms, effects
    card_images.py          images of a model card
    patch_sizes.py          cost and accuracy with other patch sizes
    test_time_registers.py  register neurons, moved to a register without training
    inspection_inputs.py    images and labels of an inspection
    inspection.py           all measurements for a model and images
    report_data.py          an inspection as plain values
    report.py               the HTML report
    inspect_tokens.py       the program scripts/inspect_tokens.py

Public names are in PUBLIC; a file is imported when one of its names is used. Nothing here is copied to the Hub,
except maps.py, which is part of the demo (hub/space.py).
"""

import importlib
from typing import Any

from .attribution import attribution as attribution


# At once, as it is called like its file, which would stand in its place once anything has imported that.


# File -> what it has for everybody.
PUBLIC = {
    "ablation": ("Effect", "ablation_effects"),
    "attribution": ("attention_rollout", "attribution"),
    "figures": (
        "GROUP_COLOURS",
        "as_picture",
        "attention_figure",
        "confusion_matrix_figure",
        "depth_figure",
        "token_layout_figure",
    ),
    "figures_of_states": (
        "effects_figure",
        "layer_similarity_figure",
        "norm_histogram_figure",
        "token_similarity_figure",
    ),
    "figures_over_depth": ("CURVES", "curve_figure", "mass_figure", "norms_figure"),
    "inspection": ("Inspection", "inspect_model"),
    "maps": ("SeenPart", "on_picture", "overlay", "patch_maps", "seen_part", "token_names"),
    "patch_sizes": ("PatchSizeRow", "patch_size_advice", "patch_size_sentences"),
    "image_report": ("Reading", "read_picture"),
    "report": ("write_figures", "write_page", "write_report"),
    "token_statistics": ("Findings", "TokenStatistics"),
    "diagnosis": ("Verdict", "artifact_verdict", "depth_story"),
}
FILES = {name: file for file, names in PUBLIC.items() for name in names}

__all__ = sorted(FILES)  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    """A public name, from its file."""
    if name not in FILES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{FILES[name]}", __name__), name)


def __dir__() -> list[str]:
    """For who completes names."""
    return sorted({*globals(), *FILES})
