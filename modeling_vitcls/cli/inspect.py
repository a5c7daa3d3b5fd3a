"""`vitcls inspect`: show what the special tokens of a model do, in a report and a summary.

    vitcls inspect --model runs/mine photo.jpg path/to/folder --output report.html
    vitcls inspect --model runs/mine --dataset path/to/classes --output report.html

The inspection is implemented in modeling_vitcls/analysis/inspect_tokens.py.
"""

from ..analysis.options import InspectOptions
from .parsing import make_positional


OPTIONS_CLASS = make_positional(InspectOptions, "paths")


def run(options: InspectOptions) -> None:
    """Inspect the special tokens of the model and write the report."""
    from ..analysis.inspect_tokens import write_inspection

    write_inspection(options)
