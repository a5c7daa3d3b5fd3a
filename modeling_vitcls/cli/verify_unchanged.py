"""`vitcls verify-unchanged`: compare the weights and the outputs of two models, to the bit.

    vitcls verify-unchanged runs/mine runs/with-weather --dataset path/to/images

The exit status is 1 if the models differ. The command is implemented in
modeling_vitcls/additions/certificate.py.
"""

from ..additions.options import VerifyUnchangedOptions
from .parsing import make_positional


OPTIONS_CLASS = make_positional(VerifyUnchangedOptions, "old", "new")


def run(options: VerifyUnchangedOptions) -> None:
    """Compare the models, and exit with status 1 if they differ."""
    from ..additions.certificate import verify_models

    if verify_models(options.old, options.new, options.dataset, options.split)["difference"]:
        raise SystemExit(1)
