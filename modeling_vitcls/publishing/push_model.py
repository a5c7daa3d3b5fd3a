"""Push a model in memory: what `model.push_to_hub(...)` uploads if this package is imported.

    model.push_to_hub("me/mine")                          `push_model` checks the right to push;
                                                          transformers saves the model to a folder, and then calls
    push_saved_model(model, folder, "me/mine", {})        this function, which uploads it with its card

Files of a run that are in the repository (results.json, the report, ...) stay if the weights and their settings
are the same, and are removed otherwise. The image processor in the repository stays.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, ModelCard, hf_hub_download
from huggingface_hub.hf_api import RepoFile
from transformers import PreTrainedModel

from ..hub.model_files import (
    ADAPTER_FILE,
    CARD_FILE,
    CONFIG_FILE,
    PROCESSOR_FILE,
    hash_settings,
)
from ..hub.model_folder import ModelFolder
from ..hub.provenance import Provenance, find_provenance
from .card import render_card
from .card_parts import find_license, is_template
from .published_files import DELETE_PATTERNS, check_weights, collect_files
from .push import (
    Branch,
    Destination,
    commit_files,
    find_code,
    merge_card,
    open_branch,
    prepare_repository,
    raise_push_errors,
)


ADVICE = "Call `push_to_hub` again, or save the model and run `vitcls push --model FOLDER`"
OTHER_FILES = (PROCESSOR_FILE,)  # Pushed on their own


def push_model(model: Any, repo_id: str, **settings: Any) -> Any:
    """Push a model; the models call it as `push_to_hub`. The arguments are those of transformers.

    Raises:
        ValueError: As in `prepare_repository`, before the model is saved.
        PushError: If the push fails. The message is a single line.
    """
    repo_id = prepare_repository(
        repo_id,
        default_name=repo_id,
        private=settings.get("private") or False,
        create_pr=settings.get("create_pr") or False,
        token=settings.get("token"),
    )
    return PreTrainedModel.push_to_hub(model, repo_id, **settings)


def push_saved_model(
    model: Any, working_dir: Any, repo_id: str, files_timestamps: Any, **settings: Any
) -> CommitInfo | None:
    """Upload a folder that a model was saved to; the models call it as `_upload_modified_files`.

    Args:
        model: The model.
        working_dir: The folder, with README.md of transformers.
        repo_id: `namespace/name` of a repository that exists.
        files_timestamps: When the files of the folder changed before; only for an adapter, which
            transformers uploads.
        settings: `revision`, `create_pr`, `token`, `commit_message` and `commit_description`.

    Raises:
        ValueError: As in `check_weights`.
        PushError: If the push fails. The message is a single line.
    """
    path = Path(working_dir)
    if (path / ADAPTER_FILE).is_file():
        upload = PreTrainedModel._upload_modified_files
        return upload(model, working_dir, repo_id, files_timestamps, **settings)
    destination = Destination(
        repo_id=repo_id,
        branch=settings.get("revision"),
        create_pr=settings.get("create_pr") or False,
        message=settings.get("commit_message") or "Upload model",
        description=settings.get("commit_description"),
        token=settings.get("token"),
    )
    folder = ModelFolder(path, repo_id)
    check_weights(folder)
    branch = open_branch(destination, ADVICE)
    folder.provenance = find_origin(model.name_or_path, branch)
    # transformers took it from the repository, or made an empty one, and added the tags
    tagged = (path / CARD_FILE).read_text(encoding="utf-8")
    is_described = branch.card is not None and not is_template(branch.card)

    patterns = [name for name in DELETE_PATTERNS if name not in OTHER_FILES]
    set_license = find_license(branch.card) if folder.provenance is None else None
    code_from = find_code(folder)
    card = render_card(folder, repo_id, folder.private_files, set_license, code_from)
    published = collect_files(folder, repo_id, code_from=code_from)
    files: Mapping[str, Path | bytes] = {**published, CARD_FILE: card.encode()}
    if is_described and has_same_model(folder, branch, destination):
        patterns = []
        files = {**files, CARD_FILE: tagged.encode()}
    elif destination.branch is None:
        files = merge_card(files, replace(branch, card=tagged), destination)
    else:
        files = merge_card(files, branch, destination)
    return commit_files(files, branch, destination, patterns, ADVICE).info


def find_origin(name: str, branch: Branch) -> Provenance | None:
    """Find the base model and its license by the name that a model was loaded from."""
    if not name:
        return None
    origin = find_provenance(name)
    if origin.base_model == branch.info.id:  # Not the base model of itself
        metadata = ModelCard(branch.card or "").data.to_dict()
        origin = replace(origin, base_model=metadata.get("base_model"))
    # Of a folder without a card nothing is known
    return origin if origin.base_model or origin.license else None


def has_same_model(folder: ModelFolder, branch: Branch, destination: Destination) -> bool:
    """Check whether the repository has the weights and the settings of a folder."""
    repo_id, commit = destination.repo_id, branch.info.sha
    if not {CONFIG_FILE, *folder.weight_files} <= set(branch.names):
        return False
    with raise_push_errors(destination, ADVICE) as api:
        tree = api.list_repo_tree(repo_id, revision=commit)
        hashes = {
            entry.path: entry.lfs.sha256
            for entry in tree
            if isinstance(entry, RepoFile) and entry.lfs is not None
        }
        config = hf_hub_download(repo_id, CONFIG_FILE, revision=commit, token=destination.token)
    published = hash_settings(Path(config).parent)[CONFIG_FILE]
    weights = {name: hashes.get(name) for name in folder.weight_files}
    return weights == folder.weights_sha256 and published == hash_settings(folder.path)[CONFIG_FILE]
