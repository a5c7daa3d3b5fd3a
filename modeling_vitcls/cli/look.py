"""`vitcls look`: draw what a model sees in a photo, on one sheet.

    vitcls look photo.jpg --model runs/mine -o sheet.png
    vitcls look path/to/folder --model timm:vit_small_patch16_224 -o sheets --image-size 448

The command is implemented in modeling_vitcls/analysis/look.py.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from ..analysis.options import LookOptions


@dataclass(frozen=True, kw_only=True)
class LookCommandOptions(LookOptions):
    # A subclass does not inherit the docstring, which is the text of the help. The help of `paths` is
    # that of the base class.
    __doc__ = LookOptions.__doc__

    paths: tyro.conf.Positional[tuple[str, ...]] = ()
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("look.png")
    """Image file for the sheet, or a folder. For several photos, the name of each photo is appended
    to the file name."""


OPTIONS_CLASS = LookCommandOptions


def run(options: LookCommandOptions) -> None:
    """Draw the sheets, and print the names of the written files."""
    from ..analysis.look import write_sheets

    write_sheets(options, options.output)
