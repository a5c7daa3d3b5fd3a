"""Push a model folder to the Hub, then prove that it loads from there: anywhere, by its commit, with equal answers.

    python scripts/push_to_hub.py --model runs/mine --hub-model-id me/my-model
    python scripts/push_to_hub.py --verify-only someone/their-model --revision COMMIT

A push needs a token: `hf auth login`, or HF_TOKEN. The work is done in modeling_vitcls/hub/.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

from command_line import errors_in_one_line, from_flags


@dataclass
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
    verify: bool = True
    """Load the pushed commit in a fresh process, and compare."""
    verify_only: str | None = None
    """Push nothing; verify this repository, against --model if it is given. This runs the code in it."""
    revision: str = "main"
    """Commit hash, branch or tag to verify."""


def main() -> None:
    """Parse, push, verify, print; the package is imported only once the flags are known to be right."""
    options = from_flags(PushOptions)
    if options.verify_only is None and options.model is None:
        print("give --model FOLDER to push, or --verify-only ID", file=sys.stderr)
        raise SystemExit(2)

    with errors_in_one_line():
        if options.verify_only is None:
            push(options)
        else:
            verify(options.verify_only, options.revision, options.model)


def push(options: PushOptions) -> None:
    """Check the rights, push, and verify the commit."""
    from modeling_vitcls.hub.publish import push_folder
    from modeling_vitcls.hub.rights import check_push_rights

    assert options.model is not None
    repo_id = check_push_rights(options.hub_model_id, options.model.resolve().name, options.private)
    pushed = push_folder(options.model, repo_id, options.private, options.message, options.branch)
    print(f"pushed {options.model} to {pushed.url}")
    if options.verify:
        try:
            verify(repo_id, pushed.commit, options.model)
        except OSError as error:
            again = f"python scripts/push_to_hub.py --verify-only {repo_id} --revision {pushed.commit}"
            raise OSError(f"{error}. It is pushed, but not verified; do that with: {again}") from error


def verify(repo_id: str, revision: str, folder: Path | None) -> None:
    """Verify, and print the certificate."""
    from modeling_vitcls.hub.verify import verify as verify_published

    print("\n".join(verify_published(repo_id, revision, folder).lines()))


if __name__ == "__main__":
    main()
