"""`vitcls push`: push a model folder to the Hub and verify the pushed commit.

    vitcls push --model runs/mine --hub-model-id me/my-model
    vitcls push --verify-only someone/their-model@COMMIT

A push requires a token: run `hf auth login`, or set HF_TOKEN. The push is implemented in
modeling_vitcls/publishing/.
"""

from dataclasses import dataclass
from pathlib import Path

from ..runtime.flags import Options


@dataclass(frozen=True, kw_only=True)
class PushOptions(Options):
    """Push a model folder to the Hub and verify the pushed commit, or verify a repository."""

    model: Path | None = None
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
    verify_only: str | None = None
    """Repository to verify without pushing, optionally with @REVISION (commit, branch or tag;
    default: main). If --model is set, the outputs of the model in the repository are compared with
    the outputs of --model. Verification runs the code in the repository."""

    def check(self) -> None:
        super().check()
        if self.model is None and self.verify_only is None:
            raise ValueError(
                "Set --model FOLDER to push a model, or --verify-only ID to verify a repository"
            )


OPTIONS_CLASS = PushOptions


def run(options: PushOptions) -> None:
    """Push a model and verify the pushed commit, or verify a repository if --verify-only is set."""
    from ..hub.loading import split_revision
    from ..hub.model_folder import ModelFolder
    from ..publishing.push import prepare_repository
    from ..publishing.verify import push_and_verify, verify

    if options.verify_only is not None:
        folder = None if options.model is None else ModelFolder(options.model)
        repo_id, revision = split_revision(options.verify_only)
        print(verify(repo_id, revision or "main", folder))
        return
    assert options.model is not None, (
        "`check` requires a model, unless only a repository is verified"
    )
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
