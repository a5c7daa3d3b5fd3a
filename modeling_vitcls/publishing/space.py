"""A Space on the Hub that runs the page in modeling_vitcls/demo/: predictions and attention maps of a model.

    model = find_published_model("someone/model", "main")
    files = build_space_files(model, title="...")       # path in the Space -> file or bytes
    push_result = push_space(files, model, "someone/model-demo")

    app.py              the model, the commit, and the call that serves the page
    vitcls_demo/        the files of the page from this package, which is not installed in the Space
    examples/           example images
    requirements.txt    requirements of the page, with the minimum versions from pyproject.toml
    README.md           the settings of the Space

The Space does not contain a copy of the model; the app loads the model at a pinned commit.
"""

import importlib.metadata
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, SpaceCard, SpaceCardData, constants
from packaging.requirements import Requirement

from ..configuration_vitcls import ViTCLSConfig
from ..files import read_json
from ..hub.connection import HUB_ERRORS, check_is_online, format_hub_error, retry, set_hub_timeout
from ..hub.loading import CONFIG_FILES
from ..hub.local_paths import check_output_is_empty
from ..hub.revisions import HubCommit, download_commit, resolve_code_commit, resolve_commit
from ..image_processing_vitcls import read_image
from .code_files import PACKAGE_FOLDER
from .manifest import RepoFiles
from .publish import TIMEOUT, PushError, PushResult, build_push_command


PAGE_FOLDER = "vitcls_demo"
EXAMPLES_FOLDER = "examples"

# Files from this package that the page requires. These files import no other files from this package.
PAGE_FILES = (
    "demo/__init__.py",
    "demo/page.py",
    "demo/reader.py",
    "demo/text.py",
    "analysis/attention_recorder.py",
    "analysis/attribution.py",
    "token_names.py",
    "analysis/maps.py",
    "analysis/model_utils.py",
    "analysis/patch_features.py",
    "configuration_vitcls.py",
    "fast_image_processing_vitcls.py",
    "image_processing_vitcls.py",
    "adaptation_vitcls.py",
    "attention_masks_vitcls.py",
    "positions_vitcls.py",
    "token_attention_vitcls.py",
)
# Libraries that the page files and the model's code import. The SDK of the Space contains gradio.
REQUIRED_LIBRARIES = (
    "huggingface_hub matplotlib numpy pillow scikit-learn safetensors torch torchvision transformers"
).split()

APP_TEMPLATE = '''"""Run the demo page of a model. The code of the page is in {folder}/."""

from pathlib import Path

from {folder}.demo.page import serve_demo


MODEL = {model!r}
# The app runs {code}. Review the code before you change the commit.
COMMIT = {commit!r}
CODE_COMMIT = {code_commit!r}

if __name__ == "__main__":
    examples = sorted(Path(__file__).parent.glob("{examples}/*"))
    serve_demo(MODEL, COMMIT, examples, code_revision=CODE_COMMIT)
'''

DESCRIPTION_TEMPLATE = """
Upload an image to see the predictions of the Vision Transformer [{model}]({url}), the attention maps of its
special tokens (CLS, distillation, registers) and its patch features in every layer.

The model is loaded at commit [`{commit}`]({url}/tree/{commit}){code}. The commit is set in `app.py`.
To run this page on your own machine: `pip install gradio=={gradio} -r requirements.txt`, then `python app.py`.
"""


@dataclass(frozen=True)
class PublishedModel:
    """A vitcls model on the Hub."""

    weights_commit: HubCommit  # commit of the model
    # Commit of the repository that contains the code; None if the code is next to the weights.
    code_commit: HubCommit | None = None

    @property
    def repo_id(self) -> str:
        """Return `namespace/name`."""
        return self.weights_commit.repo_id

    @property
    def commit(self) -> str:
        """Return the hash of the commit."""
        return self.weights_commit.sha

    @property
    def needs_token(self) -> bool:
        """Return whether a Space requires a token to load the model."""
        return self.weights_commit.needs_token or (self.code_commit is not None and self.code_commit.needs_token)


def find_published_model(repo_id: str, revision: str = "main") -> PublishedModel:
    """Look up a model on the Hub by its id and a commit hash, branch or tag.

    Raise ValueError if `repo_id` is a local folder, if the model is not on the Hub, or if it is not a vitcls model
    with code and an image processor, and OSError if the Hub does not respond.
    """
    if Path(repo_id).is_dir():
        command = build_push_command(Path(repo_id), f"YOUR-NAME/{Path(repo_id).resolve().name}")
        raise ValueError(
            f"a Space requires a model on the Hub, but {repo_id} is a folder. Push the folder first: {command}"
        )
    check_is_online()
    weights_commit = resolve_commit(repo_id, revision)
    folder = download_commit(weights_commit, CONFIG_FILES)
    config_file, processor_config_file = (folder / name for name in CONFIG_FILES)
    config_dict = read_json(config_file) if config_file.is_file() else {}
    if config_dict.get("model_type") != ViTCLSConfig.model_type or "auto_map" not in config_dict:
        raise ValueError(
            f"{repo_id} at {weights_commit.sha} does not contain a {ViTCLSConfig.model_type} model with its code. "
            "Convert the model with `vitcls convert` and push the result"
        )
    if not processor_config_file.is_file():
        raise ValueError(f"{repo_id} has no preprocessor_config.json. Save the image processor next to the model")
    return PublishedModel(weights_commit, resolve_code_commit(weights_commit, folder))


def build_space_files(model: PublishedModel, title: str | None = None, examples: Sequence[Path] = ()) -> RepoFiles:
    """Build the files of the Space. `title` is the title of the Space on the Hub and of the card.

    Raise ValueError if an example is not an image, if two examples have the same name, or if gradio is not installed.
    """
    app_code = APP_TEMPLATE.format(
        folder=PAGE_FOLDER,
        model=model.repo_id,
        code=f"the code in {model.code_commit.repo_id}" if model.code_commit else "the model's code",
        commit=model.commit,
        code_commit=model.code_commit.sha if model.code_commit else None,
        examples=EXAMPLES_FOLDER,
    )
    title = title or f"{model.repo_id.partition('/')[2]}: labels and attention"
    requirements = [Requirement(line) for line in importlib.metadata.requires(PACKAGE_FOLDER.name) or ()]
    specifiers = {
        requirement.name: str(requirement.specifier) for requirement in requirements if requirement.specifier
    }
    files: RepoFiles = {
        "app.py": app_code.encode(),
        "README.md": build_gradio_card(model, title).encode(),
        "requirements.txt": "".join(f"{name}{specifiers[name]}\n" for name in REQUIRED_LIBRARIES).encode(),
    }
    files |= {f"{PAGE_FOLDER}/{name}": PACKAGE_FOLDER / name for name in PAGE_FILES}
    for file in examples:
        path_in_space = f"{EXAMPLES_FOLDER}/{file.name}"
        if path_in_space in files:
            raise ValueError(f"two examples have the same name, {file.name}. Rename one of the examples")
        read_image(file)
        files[path_in_space] = file
    return files


def build_gradio_card(model: PublishedModel, title: str) -> str:
    """Return the text of README.md for a Space that runs the model with gradio.

    The Space uses the Python version of this process, because the default version on the Hub is too old.
    """
    try:
        gradio_version = importlib.metadata.version("gradio")
    except importlib.metadata.PackageNotFoundError:
        raise ValueError(
            "the Space uses the installed version of gradio, but gradio is not installed. Run `pip install gradio`"
        ) from None
    settings = {
        "sdk": "gradio",
        "sdk_version": gradio_version,
        "python_version": f"{sys.version_info.major}.{sys.version_info.minor}",
        "app_file": "app.py",
        "license": "apache-2.0",
    }
    code_text = ""
    if model.code_commit:
        repo_id, sha = model.code_commit.repo_id, model.code_commit.sha
        code_url = f"{constants.ENDPOINT}/{repo_id}"
        code_text = (
            f", and the model's code is loaded from [{repo_id}]({code_url}) at commit [`{sha}`]({code_url}/tree/{sha})"
        )
    return build_space_card(model, title, DESCRIPTION_TEMPLATE, settings, code=code_text, gradio=gradio_version)


def build_space_card(
    model: PublishedModel, title: str, description: str, settings: dict[str, Any], **fields: str
) -> str:
    """Return the text of README.md, whose header configures the Space. `description` is a template with the
    placeholders `model`, `commit`, `url` and the names in `fields`."""
    header = SpaceCardData(
        title=title,
        emoji="🔎",
        colorFrom="indigo",
        colorTo="gray",
        models=[model.repo_id],
        tags=["vision", "vit", "vitcls"],
        short_description="Predictions and attention maps of a ViT",
        **settings,
    )
    url = f"{constants.ENDPOINT}/{model.repo_id}"
    text = description.format(model=model.repo_id, commit=model.commit, url=url, **fields)
    return str(SpaceCard(f"---\n{header.to_yaml()}\n---\n# {title}\n{text}"))


def write_space(files: RepoFiles, folder: Path) -> None:
    """Write the files of a Space to a folder. Raise ValueError if the folder is not empty."""
    check_output_is_empty(folder)
    for name, content in files.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content if isinstance(content, bytes) else content.read_bytes())


def push_space(
    files: RepoFiles,
    model: PublishedModel,
    space_id: str,
    private: bool = False,
    sdk: Literal["gradio", "static"] = "gradio",
    flags: Sequence[str] = (),
) -> PushResult:
    """Push the files of a Space in one commit; create the Space if it does not exist.

    Call this function after `check_push_permissions(..., repo_type="space")`. If nothing has changed, no commit is
    made. `private` and `sdk` apply only to a new Space. `flags` contains the other flags of `vitcls space` that were
    used to build `files`; the command in the error message includes these flags.

    Raise PushError if the push fails. The message is a single line and ends with the command that completes the push.
    """
    check_is_online()
    try:
        with set_hub_timeout(TIMEOUT):
            return retry(lambda: push_space_once(files, model, space_id, private, sdk), f"pushing to {space_id}")
    except HUB_ERRORS as error:
        flags = ["--model", model.repo_id, "--revision", model.commit, "--space-id", space_id, *flags]
        command = shlex.join(["vitcls", "space", *flags, *(["--private"] if private else [])])
        raise PushError(
            f"the push to the Space {space_id} failed: {format_hub_error(error)}. Finish with: {command}"
        ) from error


def push_space_once(files: RepoFiles, model: PublishedModel, space_id: str, private: bool, sdk: str) -> PushResult:
    """Try to push once. Outdated page files and examples are removed, and all other files in the Space are kept.

    If another push happens in the meantime, the Hub rejects the commit (HTTP 412), and the retry builds a new commit.
    """
    api = HfApi()
    api.create_repo(space_id, repo_type="space", space_sdk=sdk, private=private or None, exist_ok=True)
    parent_commit = api.space_info(space_id).sha
    published_files = api.list_repo_files(space_id, revision=parent_commit, repo_type="space")
    folders = {PAGE_FOLDER, EXAMPLES_FOLDER, *(name.partition("/")[0] for name in files)}
    outdated_files = [name for name in published_files if name.partition("/")[0] in folders and name not in files]
    deletions = [CommitOperationDelete(name) for name in outdated_files]
    additions = [CommitOperationAdd(name, content) for name, content in files.items()]
    commit = api.create_commit(
        space_id,
        [*deletions, *additions],
        commit_message=f"Show {model.repo_id} at {model.commit[:7]}",
        repo_type="space",
        parent_commit=parent_commit,
    )
    return PushResult(space_id, commit.oid, f"{constants.ENDPOINT}/spaces/{space_id}")
