"""`vitcls verify-unchanged`: compare the weights and the outputs of two models, to the bit.

    vitcls verify-unchanged runs/mine runs/with-weather --dataset path/to/images

The exit status is 1 if the models differ. The command is implemented in
modeling_vitcls/training/certificate.py.
"""

from dataclasses import dataclass
from typing import Annotated

import tyro

from ..training.options import VerifyUnchangedOptions


@dataclass(frozen=True, kw_only=True)
class VerifyUnchangedCommandOptions(VerifyUnchangedOptions):
    # A subclass does not inherit the docstring, which is the text of the help. The help of a field
    # is that of the base class.
    __doc__ = VerifyUnchangedOptions.__doc__

    old: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="OLD")]
    new: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="NEW")]


OPTIONS_CLASS = VerifyUnchangedCommandOptions


def run(options: VerifyUnchangedOptions) -> None:
    """Compare the models, and exit with status 1 if they differ."""
    from ..training.certificate import verify_models

    if verify_models(options.old, options.new, options.dataset, options.split)["difference"]:
        raise SystemExit(1)
