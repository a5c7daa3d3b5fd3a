"""`vitcls push`: push a model folder to the Hub and verify the pushed commit.

    vitcls push --model runs/mine --hub-model-id me/my-model
    vitcls push --verify-only someone/their-model --revision COMMIT

A push requires a token: run `hf auth login`, or set HF_TOKEN. The push is implemented in modeling_vitcls/hub/.
"""

from dataclasses import dataclass, fields
from pathlib import Path


@dataclass(frozen=True)
class PushOptions:
    """Push a model folder to the Hub and verify the pushed commit, or verify a repository."""

    model: Path | None = None
    """Folder of the model."""
    hub_model_id: str | None = None
    """Repository to push to. Default: a repository in your account, named after the folder."""
    private: bool = False
    """If the repository does not exist, create it as a private repository."""
    branch: str | None = None
    """Branch to push to, created if it does not exist. Default: main."""
    message: str = "Upload model"
    """Commit message."""
    push_optimizer: bool = False
    """Also push the newest checkpoint in the folder, with the optimizer state. To resume, run
    `hf download ID --include "checkpoints/*" --local-dir DIR`, then repeat the training command with
    --output-dir DIR --resume."""
    endpoint_handler: bool = False
    """Also push handler.py, which Hugging Face Inference Endpoints require to serve the model."""
    verify: bool = True
    """Load the model from the pushed commit in a new process, and compare its outputs with the outputs of --model."""
    verify_only: str | None = None
    """Repository to verify without pushing. If --model is set, the outputs of the model in the repository are compared
    with the outputs of --model. Verification runs the code in the repository."""
    revision: str | None = None
    """Commit hash, branch or tag to verify with --verify-only. Default: main."""

    def __post_init__(self) -> None:
        if self.verify_only is None:
            if self.model is None:
                raise ValueError("Set --model FOLDER to push a model, or --verify-only ID to verify a repository")
            if self.revision is not None:
                raise ValueError("--revision requires --verify-only. To push to a branch, set --branch")
            return
        for field in fields(self):
            is_push_flag = field.name not in ("verify_only", "revision", "model")
            if is_push_flag and getattr(self, field.name) != field.default:
                flag = "--no-verify" if field.name == "verify" else f"--{field.name.replace('_', '-')}"
                raise ValueError(
                    f"--verify-only pushes nothing, but {flag} applies only to pushes. Omit one of these flags"
                )


OPTIONS_CLASS = PushOptions


def run(options: PushOptions) -> None:
    """Push a model and verify the pushed commit, or verify a repository if --verify-only is set."""
    from ..publishing.adapters import check_adapter, is_adapter
    from ..publishing.manifest import check_is_model
    from ..publishing.publish import push_folder
    from ..publishing.push_permissions import check_push_permissions
    from ..publishing.verify import verify, verify_push

    if options.verify_only is not None:
        report = verify(options.verify_only, options.revision or "main", options.model)
        print("\n".join(report.format_lines()))
        return
    folder = options.model
    assert folder is not None
    (check_adapter if is_adapter(folder) else check_is_model)(folder)
    repo_id = check_push_permissions(options.hub_model_id, folder.resolve().name, options.private)
    pushed_model = push_folder(
        folder,
        repo_id,
        options.private,
        options.message,
        options.branch,
        with_optimizer=options.push_optimizer,
        with_handler=options.endpoint_handler,
    )
    print(f"pushed    {pushed_model.summary}", flush=True)
    if options.verify and not is_adapter(folder):  # the outputs of an adapter depend on its base model
        print("verifying the pushed commit in a new process", flush=True)
        print("\n".join(verify_push(pushed_model, folder).format_lines()))
