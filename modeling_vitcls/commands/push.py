"""`vitcls push`: push a model folder to the Hub, then load the pushed commit in a new process and compare outputs.

    python scripts/push_to_hub.py --model runs/mine --hub-model-id me/my-model
    python scripts/push_to_hub.py --verify-only someone/their-model --revision COMMIT

A push needs a token: `hf auth login`, or HF_TOKEN. The push is implemented in
modeling_vitcls/hub/.
"""

from dataclasses import dataclass, fields
from pathlib import Path

from .parsing import errors_in_one_line


@dataclass(frozen=True)
class PushOptions:
    """Push a model folder to the Hub and verify it, or verify what is there."""

    model: Path | None = None
    """The folder that the model was saved to."""
    hub_model_id: str | None = None
    """Repository to push to. Default: the name of the folder, under your own name."""
    private: bool = False
    """Make the repository private where it is created."""
    branch: str | None = None
    """Branch to push to, made where it does not exist. Default: main."""
    message: str = "Upload model"
    """Of the commit."""
    push_optimizer: bool = False
    """Publish the newest checkpoint of FOLDER/checkpoints too, optimiser state included: safetensors and JSON. Others
    go on from it with `hf download ID --include "checkpoints/*" --local-dir DIR`, then the run's command with
    --output-dir DIR --resume."""
    verify: bool = True
    """Load the pushed commit in a fresh process, and compare."""
    verify_only: str | None = None
    """Push nothing; verify this repository, against --model if it is given. This runs the code in it."""
    revision: str | None = None
    """Commit hash, branch or tag to verify with --verify-only. Default: main."""

    def __post_init__(self) -> None:
        if self.verify_only is None:
            if self.model is None:
                raise ValueError("give --model FOLDER to push, or --verify-only ID")
            if self.revision is not None:
                raise ValueError("--revision is what --verify-only looks at: give both, or --branch to push to one")
            return
        for field in fields(self):
            if field.name not in FOR_VERIFYING and getattr(self, field.name) != field.default:
                raise ValueError(
                    f"--verify-only pushes nothing, so {flag(field.name)} does not go with it: leave it out"
                )


FOR_VERIFYING = ("verify_only", "revision", "model")


def flag(name: str) -> str:
    """A field's name as it is given on the command line."""
    return "--no-verify" if name == "verify" else f"--{name.replace('_', '-')}"


OPTIONS = PushOptions


def run(options: PushOptions) -> None:
    """Push and verify, or verify only."""
    with errors_in_one_line():
        if options.verify_only is None:
            push(options)
        else:
            verify(options.verify_only, options.revision or "main", options.model)


def push(options: PushOptions) -> None:
    """Check the rights, push, and verify the commit."""
    from ..hub.manifest import check_is_model
    from ..hub.publish import push_folder
    from ..hub.push_permissions import check_push_permissions
    from ..hub.verify import verify_push

    folder = options.model
    assert folder is not None
    check_is_model(folder)
    repo_id = check_push_permissions(options.hub_model_id, folder.resolve().name, options.private)
    pushed = push_folder(
        folder, repo_id, options.private, options.message, options.branch, with_optimizer=options.push_optimizer
    )
    print(f"pushed    {pushed.summary}", flush=True)
    if options.verify:
        print("verifying loading it from there in a fresh process", flush=True)
        print("\n".join(verify_push(pushed, folder).format_lines()))


def verify(repo_id: str, revision: str, folder: Path | None) -> None:
    """Verify what is published, and print the certificate."""
    from ..hub.verify import verify as verify_published

    print("\n".join(verify_published(repo_id, revision, folder).format_lines()))
