"""`vitcls inspect`: show what the special tokens of a model do, in a report and a summary.

    vitcls inspect --model runs/mine photo.jpg path/to/folder --output report.html
    vitcls inspect --model runs/digits --dataset digits --json report.json

The inspection is implemented in modeling_vitcls/analysis/inspect_tokens.py.
"""

from dataclasses import dataclass

import tyro

from ..analysis.options import InspectOptions


@dataclass(frozen=True, kw_only=True)
class InspectCommandOptions(InspectOptions):
    # A subclass does not inherit the docstring, which is the text of the help. The help of the field
    # is that of the base class.
    __doc__ = InspectOptions.__doc__

    paths: tyro.conf.Positional[tuple[str, ...]] = ()


OPTIONS_CLASS = InspectCommandOptions


def run(options: InspectOptions) -> None:
    """Inspect the special tokens of the model and write the report."""
    from ..analysis.inspect_tokens import write_inspection

    write_inspection(options)
