"""`vitcls look`: show what a model sees in a photo, on one sheet.

    vitcls look photo.jpg --model runs/mine -o sheet.html
    vitcls look path/to/folder --model timm:vit_small_patch16_224 -o sheets --image-size 448

The command is implemented in modeling_vitcls/analysis/look.py.
"""

from pathlib import Path

from ..analysis.options import LookOptions
from .parsing import make_positional


OPTIONS_CLASS = make_positional(LookOptions, "paths")


def run(options: LookOptions) -> None:
    """Write the sheets, and print the names of the written files."""
    from ..analysis.look import write_sheets

    write_sheets(options, options.output or Path("look.html"))
