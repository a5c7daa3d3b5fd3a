"""See what the special tokens of a model do: one page, and the verdicts on the terminal.

    python scripts/inspect_tokens.py --model runs/mine photo.jpg path/to/folder --output report.html
    python scripts/inspect_tokens.py --model runs/digits --dataset digits --patch-sizes 4 8 16

`--help` lists the flags. The work is done in modeling_vitcls/analysis/inspect_tokens.py.
"""

from dataclasses import dataclass

import tyro
from command_line import errors_in_one_line, from_flags, options_module


InspectOptions = options_module().InspectOptions


@dataclass(frozen=True)
class Command(InspectOptions):
    __doc__ = InspectOptions.__doc__

    paths: tyro.conf.Positional[tuple[str, ...]] = ()
    """Image files, folders (with all folders in them), or URLs."""


def main() -> None:
    """Parse, inspect; the package is imported only once the flags are known to be right."""
    options = from_flags(Command)

    from transformers.utils.logging import disable_progress_bar

    from modeling_vitcls.analysis.inspect_tokens import inspect_tokens

    disable_progress_bar()  # of loading weights
    with errors_in_one_line():
        inspect_tokens(options)


if __name__ == "__main__":
    main()
