"""The pictures that a finished run hands to its trackers: those of its card, and the main ones of its report.

Figures are drawn in modeling_vitcls/analysis/, and pictures handed over in reporting.py.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image

from ..analysis.figures import as_picture, depth_figure
from ..analysis.figures_of_states import effects_figure
from ..analysis.figures_over_depth import curve_figure, mass_figure, norms_figure
from ..analysis.inspection import Inspection


Track = Callable[[Mapping[str, Image.Image]], None]


def tracked_pictures(folder: Path, drawn: Mapping[str, str], inspection: Inspection | None) -> dict[str, Image.Image]:
    """Pictures by name.

    Args:
        folder: of the run.
        drawn: name of each picture of the card -> its path from the folder.
        inspection: of the trained model; None where it failed.
    """
    pictures: dict[str, Image.Image] = {name: Image.open(folder / path) for name, path in drawn.items()}
    if inspection is not None:
        found = figures(inspection, with_samples="attention" in drawn)
        pictures |= {name: as_picture(figure) for name, figure in found.items()}
    return pictures


def figures(inspection: Inspection, with_samples: bool) -> dict[str, Figure]:
    """The main figures of the report, of what the model has; held-out pictures only where the card shows some, as
    trackers may be elsewhere."""
    config, findings = inspection.config, inspection.findings
    found = {
        "patch_distance": curve_figure(config, findings, "patch_distance"),
        "norms": norms_figure(config, findings),
    }
    if config.token_layout.num_prefix_tokens:
        found |= {"entropy": curve_figure(config, findings, "entropy"), "mass": mass_figure(config, findings)}
        if with_samples and inspection.readings:
            found["attention_over_depth"] = depth_figure(config, inspection.readings[0])
        if inspection.effects:
            found["effects"] = effects_figure(config, inspection.effects)
    return found
