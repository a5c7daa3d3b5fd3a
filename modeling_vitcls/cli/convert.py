"""`vitcls convert`: convert a timm or transformers ViT, or convert a model back.

    vitcls convert timm:vit_base_patch14_reg4_dinov2.lvd142m converted
    vitcls convert transformers:facebook/dinov2-base@COMMIT converted
    vitcls convert dinov2_vits14_reg4_pretrain.pth converted
    vitcls convert runs/mine native --to transformers

The first argument is `--model`, the second `--output`.

The conversions are implemented in modeling_vitcls/conversion/convert.py.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..runtime.flags import Options


@dataclass(frozen=True, kw_only=True)
class ConvertOptions(Options):
    """Convert a ViT and save the converted model.

    Nothing is written if the outputs of the two models differ by more than the limit.
    """

    output: Path
    """Output folder, which must be empty or must not exist."""
    to: Literal["vitcls", "transformers"] = "vitcls"
    """Convert to a vitcls model, or a vitcls model to one of transformers, which requires no remote
    code."""
    model: str
    """timm:NAME, timm:NAME@FILE (weights from a file), transformers:PATH_OR_ID or a state-dict
    file. An id may end with @REVISION (commit, branch or tag). With --to transformers: folder or
    Hub id of a vitcls model."""
    family: str | None = None
    """Model family of a state-dict file, such as dino, ibot, mae or dinov2. Default: detected from
    the parameter names."""


OPTIONS_CLASS = ConvertOptions
ARGUMENTS = ("model", "output")


def run(options: ConvertOptions) -> None:
    """Convert the model, and print the parity report and the command that pushes the model."""
    from ..conversion.convert import convert_checkpoint, convert_to_native
    from ..hub.model_folder import ModelFolder
    from ..publishing.card import write_card
    from ..publishing.push import build_push_command

    if options.to == "transformers":
        report = convert_to_native(options.model, options.output)
    else:
        report = convert_checkpoint(options.model, options.output, options.family)
    # The card is rendered from the files of the folder, so it comes last.
    write_card(ModelFolder(options.output))

    print(
        f"Largest differences between {report['model_class']} and {report['source']} (limit "
        f"{report['limit']:g}):"
    )
    for comparison in report["comparisons"]:
        differences = ", ".join(
            f"{name} {value:.1e}" for name, value in comparison["differences"].items()
        )
        print("- {} x {} pixels: {}".format(*comparison["image_size"], differences))
    if reason := report["preprocessing"]["assumed_because"]:
        print(f"Image processor: the settings are assumed, because {reason}. Check them")
    print(*report["notes"], f"Classifier: {report['classifier']}", sep="\n")
    print(
        f"\nWritten to {options.output}. README.md has the code that loads the model. To push and "
        "verify the model, run"
    )
    repo_id = f"YOUR-NAME/{options.output.resolve().name}"
    print(f"  {build_push_command(options.output, repo_id)}")
