"""The Space: a page on the Hub where anyone can try a model, which runs the files of modeling_vitcls/demo/.

    model = published_model("someone/model", "main")
    contents = space_contents(model, title="...")       # path in the Space -> file or bytes
    pushed = push_space(contents, model, "someone/model-demo")

    app.py              names the model and its commit
    vitcls_demo/        the page, as it is in this package, which is not installed there
    examples/           pictures to try
    requirements.txt    what the page needs, from pyproject.toml's versions on
    README.md           the Space's settings

What the page shows is in modeling_vitcls/demo/. The model is not copied: the Space loads it by its commit.
"""

import importlib.metadata
import shlex
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, SpaceCard, SpaceCardData
from packaging.requirements import Requirement

from ..configuration_vitcls import ViTCLSConfig
from ..image_processing_vitcls import read_image
from .connection import HUB_ERRORS, check_is_online, endpoint, in_one_line, patience, tried_again
from .local_paths import check_free
from .manifest import REFERRING, Contents, read_json
from .publish import PATIENCE, Pushed, PushFailed, push_command
from .revisions import Published, code_of, published


PACKAGE = Path(__file__).parents[1]
FOLDER = "vitcls_demo"
EXAMPLES = "examples"

# The files of this package that the page needs; they import of it only each other.
SHIPPED = (
    "demo/__init__.py",
    "demo/page.py",
    "demo/reader.py",
    "demo/text.py",
    "analysis/maps.py",
    "configuration_vitcls.py",
    "fast_image_processing_vitcls.py",
    "image_processing_vitcls.py",
    "adaptation_vitcls.py",
    "attention_masks_vitcls.py",
    "positions_vitcls.py",
)
# What these, and the model's own code, import. gradio comes with the Space's SDK.
NEEDED = (
    "huggingface_hub",
    "matplotlib",
    "numpy",
    "pillow",
    "safetensors",
    "torch",
    "torchvision",
    "transformers",
)

APP = '''"""The page of a model; what it shows is in {folder}/."""

from pathlib import Path

from {folder}.demo.page import show


MODEL = {model!r}
# {runs}: look at it before another commit stands here.
COMMIT = {commit!r}
CODE_COMMIT = {code_commit!r}

if __name__ == "__main__":
    examples = sorted(Path(__file__).parent.glob("{examples}/*"))
    show(MODEL, COMMIT, examples, code_revision=CODE_COMMIT)
'''

CARD = """---
{settings}
---
# {title}

Give it a picture: it shows what the Vision Transformer [{model}]({address}) says it is, and what its special tokens
(CLS, distillation, registers) look at in every layer.

The model is loaded at commit [`{commit}`]({address}/tree/{commit}){code}, which stands in `app.py`. To run
this page on your own machine: `pip install gradio=={gradio} -r requirements.txt`, then `python app.py`.
"""


@dataclass(frozen=True)
class PublishedModel:
    """A vitcls model on the Hub.

    Attributes:
        at: its commit.
        code: the commit of the repository that its code is in; None where the code lies beside the weights.
    """

    at: Published
    code: Published | None = None

    @property
    def repo_id(self) -> str:
        """`namespace/name`."""
        return self.at.repo_id

    @property
    def commit(self) -> str:
        """Its hash."""
        return self.at.commit

    @property
    def is_closed(self) -> bool:
        """Whether a Space needs a token to load it."""
        return self.at.is_closed or (self.code is not None and self.code.is_closed)


def published_model(repo_id: str, revision: str = "main") -> PublishedModel:
    """Look a model up on the Hub.

    Args:
        repo_id: `namespace/name`.
        revision: commit hash, branch or tag.

    Raises:
        ValueError: in one line, for a folder, what is not on the Hub, or a model of another kind.
        OSError: in one line, where the Hub does not answer.
    """
    if Path(repo_id).is_dir():
        command = push_command(Path(repo_id), f"YOUR-NAME/{Path(repo_id).resolve().name}")
        raise ValueError(
            f"{repo_id} is a folder, and a Space loads its model from the Hub: push it first with {command}"
        )
    check_is_online()
    model = published(repo_id, revision)
    try:
        with patience(PATIENCE):
            fetched = tried_again(
                lambda: HfApi().snapshot_download(repo_id, revision=model.commit, allow_patterns=list(REFERRING)),
                f"reading {repo_id}",
            )
    except HUB_ERRORS as error:
        raise OSError(f"cannot ask the Hub for {repo_id}: {in_one_line(error)}") from error
    config, preprocessor_config = (Path(fetched, name) for name in REFERRING)
    settings = read_json(config) if config.is_file() else {}
    if settings.get("model_type") != ViTCLSConfig.model_type or "auto_map" not in settings:
        raise ValueError(
            f"{repo_id} at {model.commit} holds no {ViTCLSConfig.model_type} model with its code: convert it with "
            "scripts/convert.py and push the result"
        )
    if not preprocessor_config.is_file():
        raise ValueError(f"{repo_id} has no preprocessor_config.json: save the image processor beside the model")
    return PublishedModel(model, code_of(model, Path(fetched)))


# Files ---------------------------------------------------------------------------------------------------------------


def space_contents(model: PublishedModel, title: str | None = None, examples: Sequence[Path] = ()) -> Contents:
    """The files of the Space.

    Args:
        title: of the page in the Hub's lists. Default: from the model's name.
        examples: pictures to try it with.

    Raises:
        ValueError: in one line, for an example that is no picture, two of one name, or where gradio is not installed.
    """
    app = APP.format(
        folder=FOLDER,
        model=model.repo_id,
        runs=f"The code in {model.code.repo_id} is run" if model.code else "The model's code is run",
        commit=model.commit,
        code_commit=model.code.commit if model.code else None,
        examples=EXAMPLES,
    )
    contents: Contents = {
        "app.py": app.encode(),
        "README.md": card(model, title or f"{model.repo_id.partition('/')[2]}: labels and attention").encode(),
        "requirements.txt": "".join(f"{line}\n" for line in requirements()).encode(),
    }
    contents |= {f"{FOLDER}/{name}": PACKAGE / name for name in SHIPPED}
    return contents | example_contents(examples)


def card(model: PublishedModel, title: str) -> str:
    """README.md, whose header sets the Space up. Python's version is this one's: the Hub's default is too old."""
    try:
        gradio = importlib.metadata.version("gradio")
    except importlib.metadata.PackageNotFoundError:
        raise ValueError(
            "gradio is not installed, whose version the Space is to have: run `pip install gradio`"
        ) from None
    settings = SpaceCardData(
        title=title,
        emoji="🔎",
        colorFrom="indigo",
        colorTo="gray",
        sdk="gradio",
        sdk_version=gradio,
        python_version=f"{sys.version_info.major}.{sys.version_info.minor}",
        app_file="app.py",
        models=[model.repo_id],
        license="apache-2.0",
        tags=["vision", "vit", "vitcls"],
        short_description="What a ViT sees, and what its tokens look at",
    )
    return str(
        SpaceCard(
            CARD.format(
                settings=settings.to_yaml(),
                title=title,
                model=model.repo_id,
                commit=model.commit,
                code=code_in_words(model.code) if model.code else "",
                gradio=gradio,
                address=f"{endpoint()}/{model.repo_id}",
            )
        )
    )


def code_in_words(code: Published) -> str:
    """Where the model's code is from, in Markdown."""
    address = f"{endpoint()}/{code.repo_id}"
    return f", its code from [{code.repo_id}]({address}) at commit [`{code.commit}`]({address}/tree/{code.commit})"


def requirements() -> list[str]:
    """Lines for pip: what the page needs, with the lowest versions that this package allows."""
    declared = [Requirement(line) for line in importlib.metadata.requires(PACKAGE.name) or ()]
    bounds = {requirement.name: str(requirement.specifier) for requirement in declared if requirement.specifier}
    return [f"{name}{bounds[name]}" for name in NEEDED]


def example_contents(examples: Iterable[Path]) -> Contents:
    """The example pictures, by their path in the Space."""
    contents: Contents = {}
    for file in examples:
        name = f"{EXAMPLES}/{file.name}"
        if name in contents:
            raise ValueError(f"two of the examples are called {file.name}: rename one")
        read_image(file)
        contents[name] = file
    return contents


def write_space(contents: Contents, folder: Path) -> None:
    """Put the files into a folder, which a Space can be made of by hand, or run: `python app.py`.

    Raises:
        ValueError: in one line, for a folder with something in it.
    """
    check_free(folder)
    for name, content in contents.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content if isinstance(content, bytes) else content.read_bytes())


# The push ------------------------------------------------------------------------------------------------------------


def push_space(
    contents: Contents, model: PublishedModel, space_id: str, private: bool = False, title: str | None = None
) -> Pushed:
    """Create the Space where it does not exist, and put its files there in one commit.

    Call it after `check_push_rights(..., repo_type="space")`. A commit that would change nothing is not made.

    Args:
        contents: from `space_contents`.
        model: whose Space it is.
        space_id: `namespace/name`.
        private: whether a new Space is private.
        title: what `space_contents` was given, for the command that finishes the job.

    Raises:
        PushFailed: an OSError, in one line, with the command that finishes the job.
    """
    check_is_online()
    try:
        with patience(PATIENCE):
            return tried_again(lambda: push_once(contents, model, space_id, private), f"pushing to {space_id}")
    except HUB_ERRORS as error:
        again = space_command(contents, model, space_id, private, title)
        raise PushFailed(
            f"the push to the Space {space_id} failed: {in_one_line(error)}. Finish with: {again}"
        ) from error


def push_once(contents: Contents, model: PublishedModel, space_id: str, private: bool) -> Pushed:
    """One attempt. Files of an earlier push that these do not have are removed; others' are left.

    Where someone else pushes in the meantime the Hub refuses the commit (HTTP 412), which is then built anew.
    """
    api = HfApi()
    api.create_repo(space_id, repo_type="space", space_sdk="gradio", private=private or None, exist_ok=True)
    parent = api.space_info(space_id).sha
    there = api.list_repo_files(space_id, revision=parent, repo_type="space")
    outdated = [name for name in there if name.startswith((f"{FOLDER}/", f"{EXAMPLES}/")) and name not in contents]
    operations: list[CommitOperationAdd | CommitOperationDelete] = [CommitOperationDelete(name) for name in outdated]
    operations += [CommitOperationAdd(name, content) for name, content in contents.items()]
    message = f"Show {model.repo_id} at {model.commit[:7]}"
    commit = api.create_commit(space_id, operations, commit_message=message, repo_type="space", parent_commit=parent)
    return Pushed(space_id, commit.oid, f"{endpoint()}/spaces/{space_id}")


def space_command(contents: Contents, model: PublishedModel, space_id: str, private: bool, title: str | None) -> str:
    """The command line that pushes the Space."""
    flags = ["--model", model.repo_id, "--revision", model.commit, "--space-id", space_id]
    flags += ["--private"] if private else []
    flags += ["--title", title] if title else []
    examples = [str(file) for name, file in contents.items() if name.startswith(f"{EXAMPLES}/")]
    flags += ["--examples", *examples] if examples else []
    return f"python scripts/push_space.py {shlex.join(flags)}"
