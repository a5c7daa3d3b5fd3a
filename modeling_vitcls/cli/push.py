"""`vitcls push`: push a model folder to the Hub and verify the pushed commit.

    vitcls push --model runs/mine --hub-model-id me/my-model

A push requires a token: run `hf auth login`, or set HF_TOKEN. The push is implemented in
modeling_vitcls/publishing/.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from ..runtime.flags import Options, check_value


@dataclass(frozen=True, kw_only=True)
class PushOptions(Options):
    """Push a model folder to the Hub and verify the pushed commit."""

    model: Path
    """Folder of the model."""
    hub_model_id: str | None = None
    """Repository to push to. Default: a repository in your account, named after the folder."""
    private: bool = False
    """If the repository does not exist, create it as a private repository."""
    branch: str | None = None
    """Branch to push to, created if it does not exist. Default: main."""
    license: str | None = None
    """License of the weights for the model card: a Hub identifier such as apache-2.0. Default: the
    license of the initial weights, if they have one."""
    card_samples: bool = False
    """Show a few held-out images in the model card, and publish report.html with held-out and
    training images, even if the repository is public and the images are local files. Images of
    `digits` and of datasets on the Hub are always published."""
    verify: bool = True
    """Load the model from the pushed commit in a new process, and compare its outputs with the
    outputs of --model."""

    def check(self) -> None:
        super().check()
        is_identifier = self.license is None or re.fullmatch(r"[a-z0-9.-]+", self.license)
        check_value(self, "license", bool(is_identifier), "an identifier, such as apache-2.0")


OPTIONS_CLASS = PushOptions


def run(options: PushOptions) -> None:
    """Push a model, and verify the pushed commit."""
    from ..hub.model_folder import ModelFolder
    from ..publishing.push import prepare_repository
    from ..publishing.verify import push_and_verify

    folder = ModelFolder(options.model)
    # This comes first, so a folder that cannot be pushed leaves no empty repository on the Hub.
    folder.check_is_complete()
    folder.warn_about_edited_settings()
    repo_id = prepare_repository(
        options.hub_model_id, options.model.resolve().name, options.private
    )
    push_and_verify(
        folder,
        repo_id,
        options.verify,
        private=options.private,
        branch=options.branch,
        license_id=options.license,
        card_samples=options.card_samples,
    )
