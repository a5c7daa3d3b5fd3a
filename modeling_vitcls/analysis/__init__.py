"""What the special tokens do, and what an answer rests on.

    from modeling_vitcls.analysis import write_report
    write_report("report.html", model, processor, pictures)

    maps.py                  attention to patches as maps on an image's own pixel grid
    attribution.py           through all layers: attention rollout, and attribution by gradients
    statistics.py            figures over many images, per layer, head and token
    ablation.py              what a token is worth to the answer
    verdicts.py              all that in words
    recording.py             the attention of every layer of a forward pass, which these are made of
    classifiers.py           what a model is, whatever it is wrapped in
    readings.py              one picture: the answer and its maps
    figures.py               matplotlib figures, for cards, notebooks and trackers: layout, answers, attention
    figures_over_depth.py    curves by layer
    figures_of_states.py     similarities, norms, effects
    patch_sizes.py           what other patch sizes would mean
    inspection.py            all of it at once, for a model and pictures
    report.py                the page that shows it
    inspect_tokens.py        the command

What is public is in PUBLIC; a file is imported when something of it is asked for. Nothing here ships to the Hub, but
maps.py goes with the demo (hub/space.py).
"""

import importlib
from typing import Any

# At once, as it is called like its file, which would stand in its place once anything has imported that.
from .attribution import attribution as attribution


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
    "readings": ("Reading", "read_picture"),
    "report": ("write_figures", "write_page", "write_report"),
    "statistics": ("Findings", "TokenStatistics"),
    "verdicts": ("Verdict", "artifact_verdict", "depth_story"),
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
