"""One code for many models: publish it as a repository, and replace it in published models.

    push_code("me/vitcls-code")                          models refer to it (`vitcls push --code-from`)
    update_code(["me"])                                  list the code of all models of an account
    update_code(["me/birds"], is_pushed=True)            replace it, if the outputs are equal to the bit

The code of a repository runs only in a process of its own, without this package.
"""

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from huggingface_hub import HfApi, ModelCardData, hf_hub_download, snapshot_download

from ..hub.connection import HUB_ERRORS, check_is_online, format_hub_error, set_hub_timeout
from ..hub.model_code import (
    SEPARATOR,
    compare_code,
    get_code_version,
    hash_code,
    list_published_code,
    read_own_code,
)
from ..hub.model_files import (
    CARD_FILE,
    CODE_PATTERN,
    CONFIG_FILE,
    MODEL_PATTERNS,
)
from ..hub.model_folder import ModelFolder, list_code_references
from ..runtime.errors import format_name_list
from ..runtime.files import read_json
from .published_files import CODE_LICENSE_FILE, read_code_license
from .push import (
    TIMEOUT,
    Branch,
    Destination,
    PushedCommit,
    commit_files,
    prepare_repository,
    raise_push_errors,
    upload_files,
)
from .verify import run_verification_script


CARD = """---
{metadata}
---

# {name}

The code of modeling_vitcls, for models that refer to it. The version is {version}, and each version has a tag.
To read it once for all models, begin with `configuration_vitcls.py` and `modeling_vitcls.py`, and pin the commit:

```python
from transformers import AutoModel

model = AutoModel.from_pretrained("MODEL", revision="COMMIT OF MODEL", code_revision="COMMIT", trust_remote_code=True)
```
"""


def push_code(repo_id: str, private: bool = False) -> tuple[PushedCommit, str]:
    """Publish the files of this package that travel with a model, and return the commit and its tag.

    Raises:
        ValueError: As in `prepare_repository`.
        PushError: If the push fails. The message is a single line.
    """
    repo_id = prepare_repository(repo_id, "vitcls-code", private)
    version = get_code_version()
    metadata = ModelCardData(license="apache-2.0", library_name="transformers", tags=["vitcls"])
    files: dict[str, Path | bytes] = {
        **read_own_code(),
        CODE_LICENSE_FILE: read_code_license().encode(),
        CARD_FILE: CARD.format(metadata=metadata.to_yaml(), name=repo_id, version=version).encode(),
    }
    destination = Destination(repo_id=repo_id, message=f"Code of modeling_vitcls {version}")
    advice = f"Repeat `vitcls push-code {repo_id}`"
    pushed = upload_files(files, destination, [CODE_PATTERN], advice)
    tag = f"v{version.replace('+', '-')}"
    with raise_push_errors(destination, advice) as api:
        api.create_tag(repo_id, tag=tag, revision=pushed.sha, exist_ok=True)
    return pushed, tag


# Published models ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class PublishedCode:
    """The code of a published model."""

    info: Any  # ModelInfo
    names: tuple[str, ...]  # The files of the repository
    config: dict[str, Any]
    other_code: tuple[str, ...]  # Code files that differ from this package's
    reason: str = ""  # Why the code was not replaced
    url: str = ""  # The commit or the pull request that replaced it

    def describe(self) -> str:
        """Write a line about the model and its code."""
        version = self.config.get("code_version", "unknown version")
        references = list_code_references(self.config.get("auto_map"))
        elsewhere = [name for name in references if SEPARATOR in name]
        state = "code of this package"
        if elsewhere:
            version = "no code"
            state = f"refers to {elsewhere[0].partition(SEPARATOR)[0]}"
        elif self.other_code:
            state = f"other code: {format_name_list(list(self.other_code))}"
        if self.reason:
            state = f"left alone: {self.reason}"
        elif self.url:
            state = f"updated: {self.url}"
        return f"{self.info.id}  {version}  {state}"


def update_code(
    names: Sequence[str], is_pushed: bool = False, create_pr: bool = False
) -> list[PublishedCode]:
    """List the code of published models, and replace it where the outputs stay equal to the bit.

    Nothing but config.json is downloaded, except the models that are updated.

    Args:
        names: Accounts, whose vitcls models are all listed, and ids of models.
        is_pushed: Whether to replace the code.
        create_pr: Whether to open pull requests.

    Returns:
        A row for each vitcls model.

    Raises:
        ValueError: If a name is not found.
    """
    check_is_online()
    rows = []
    for repo_id in list_repositories(names):
        row = read_published_code(repo_id)
        if row is None:
            continue
        if is_pushed and row.other_code:
            row = replace_code(row, create_pr)
        print(row.describe(), flush=True)
        rows.append(row)
    return rows


def list_repositories(names: Sequence[str]) -> list[str]:
    """List the models of accounts, and the models that are named."""
    repositories = []
    for name in names:
        if "/" in name:
            repositories.append(name)
            continue
        try:
            with set_hub_timeout(TIMEOUT):
                repositories += sorted(info.id for info in HfApi().list_models(author=name))
        except HUB_ERRORS as error:
            raise ValueError(
                f"cannot list the models of {name}: {format_hub_error(error)}"
            ) from error
    return repositories


def read_published_code(repo_id: str) -> PublishedCode | None:
    """Read which code a repository has; None if it has no vitcls model. Raise ValueError if that fails."""
    try:
        with set_hub_timeout(TIMEOUT):
            info = HfApi().model_info(repo_id)
            names = tuple(each.rfilename for each in info.siblings or ())
            if CONFIG_FILE not in names:
                return None
            config = read_json(Path(hf_hub_download(repo_id, CONFIG_FILE, revision=info.sha)))
            code = list_published_code(repo_id, info.sha)
    except HUB_ERRORS as error:
        raise ValueError(f"cannot read {repo_id}: {format_hub_error(error)}") from error
    if config.get("model_type") != "vitcls":
        return None
    other_code = compare_code(code, hash_code(read_own_code())) if code else []
    return PublishedCode(info, names, config, tuple(other_code))


def replace_code(row: PublishedCode, create_pr: bool) -> PublishedCode:
    """Replace the code of a model, unless its outputs would differ, and say what was done.

    Raise PushError if the push fails.
    """
    code = read_own_code()
    modules = {
        reference.partition(".")[0]
        for reference in list_code_references(row.config.get("auto_map", {}))
    }
    if own := sorted(modules - {name.removesuffix(".py") for name in code}):
        return replace(row, reason=f"it has code of its own: {format_name_list(own)}")
    print(f"{row.info.id}  comparing the outputs of the old and the new code", flush=True)
    try:
        check_outputs_stay(row)
    except (ValueError, OSError) as error:
        return replace(row, reason=str(error))

    config = row.config | {"code_version": get_code_version()}
    files: dict[str, Path | bytes] = {
        **code,
        CONFIG_FILE: f"{json.dumps(config, indent=2)}\n".encode(),
        CODE_LICENSE_FILE: read_code_license().encode(),
    }
    destination = Destination(
        repo_id=row.info.id,
        create_pr=create_pr,
        message=f"Update the code to modeling_vitcls {get_code_version()}",
    )
    branch = Branch(row.info, list(row.names), None)
    advice = f"Repeat `vitcls update-code {row.info.id} --push`"
    pushed = commit_files(files, branch, destination, [CODE_PATTERN], advice)
    return replace(row, config=config, url=pushed.url)


def check_outputs_stay(row: PublishedCode) -> None:
    """Raise ValueError unless a model has the same outputs with its code and with this package's."""
    repo_id = row.info.id
    with TemporaryDirectory(prefix="vitcls-update-") as folder:
        old, new = Path(folder, "old"), Path(folder, "new")
        patterns = [*MODEL_PATTERNS, "*.py"]
        try:
            snapshot_download(
                repo_id, revision=row.info.sha, allow_patterns=patterns, local_dir=old
            )
        except HUB_ERRORS as error:
            raise ValueError(f"cannot download it: {format_hub_error(error)}") from error
        shutil.copytree(old, new, copy_function=os.link)
        for file in new.glob(CODE_PATTERN):
            file.unlink()  # A link, whose content must stay
        for name, content in read_own_code().items():
            (new / name).write_bytes(content)

        auto_class = ModelFolder(old, repo_id).auto_class
        before, _ = run_verification_script(str(old), auto_class)
        after, _ = run_verification_script(str(new), auto_class)
    changed = [
        name for name in before if name not in after or not torch.equal(before[name], after[name])
    ]
    if changed:
        raise ValueError(f"the new code computes other {format_name_list(changed)}")
