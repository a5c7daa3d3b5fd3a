"""Uploads of training checkpoints to a branch of the run's repository."""

from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

from huggingface_hub import CommitInfo, HfApi

from ..hub.connection import HUB_ERRORS, format_hub_error


def build_checkpoint_uploader(
    repo_id: str, branch: str, warn: Callable[[str], None]
) -> Callable[[Path], None]:
    """Return a function that uploads the folder of a saved checkpoint in the background.

    Earlier checkpoints are removed from the branch.

    A checkpoint that is saved during an upload is not uploaded. Errors are passed to `warn` and do
    not end the run. To resume on another machine, run `hf download ID --revision BRANCH --local-dir
    DIR`, and repeat the command with --output-dir DIR --resume.
    """
    api = HfApi()
    uploads: list[Future[CommitInfo]] = []

    def report_error(upload: "Future[CommitInfo]") -> None:
        if error := upload.exception():
            warn(
                f"a checkpoint was not uploaded to the branch {branch} of {repo_id}: "
                f"{format_hub_error(error)}"
            )

    def upload_checkpoint(folder: Path) -> None:
        if uploads and not uploads[-1].done():
            return
        try:
            api.create_branch(repo_id, branch=branch, exist_ok=True)
        except HUB_ERRORS as error:
            warn(f"the branch {branch} of {repo_id} was not created: {format_hub_error(error)}")
            return
        upload = api.upload_folder(
            repo_id=repo_id,
            folder_path=folder.parent,
            path_in_repo="checkpoints",
            allow_patterns=[f"{folder.name}/*"],
            delete_patterns=["step-*"],
            revision=branch,
            commit_message=folder.name,
            run_as_future=True,
        )
        upload.add_done_callback(report_error)
        uploads.append(upload)

    return upload_checkpoint
