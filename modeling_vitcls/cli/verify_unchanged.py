"""`vitcls verify-unchanged`: compare the weights and the outputs of two models, to the bit.

    vitcls verify-unchanged runs/mine runs/with-weather --dataset path/to/images

The exit status is 1 if the models differ. The command is implemented in
modeling_vitcls/training/certificate.py.
"""

from dataclasses import dataclass

import tyro

from ..training.options import VerifyUnchangedOptions


@dataclass(frozen=True, kw_only=True)
class VerifyUnchangedCommandOptions(VerifyUnchangedOptions):
    __doc__ = VerifyUnchangedOptions.__doc__

    old: tyro.conf.Positional[str]
    """The model before the change: a folder or a Hub id (`ID@COMMIT` pins the model)."""
    new: tyro.conf.Positional[str]
    """The model after the change."""


OPTIONS_CLASS = VerifyUnchangedCommandOptions


def run(options: VerifyUnchangedCommandOptions) -> None:
    """Compare the models, and exit with status 1 if they differ."""
    from ..training.certificate import verify_models

    if verify_models(options)["difference"] is not None:
        raise SystemExit(1)
