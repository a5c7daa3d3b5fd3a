"""A Space on the Hub that labels photos with a model.

    model = find_published_model("someone/model@COMMIT")
    write_space(folder, model)
    pushed = push_space(folder, model, "someone/model-demo")

    app.py              transformers' pipeline of the model at a commit, as a page of gradio
    examples/           example images
    requirements.txt    requirements of the app, with the minimum versions from pyproject.toml
    README.md           the settings of the Space

The Space does not contain a copy of the model; the app loads the model at a pinned commit.
"""

import importlib.metadata
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelInfo, SpaceCard, SpaceCardData, constants
from packaging.requirements import Requirement

from modeling_vitcls.hub.connection import check_is_online
from modeling_vitcls.hub.loading import get_model_folder, split_revision
from modeling_vitcls.hub.model_files import CONFIG_FILE, CONFIG_FILES, PROCESSOR_FILE
from modeling_vitcls.hub.model_folder import list_code_references
from modeling_vitcls.model.configuration_vitcls import ViTCLSConfig
from modeling_vitcls.publishing.push import (
    Destination,
    PushedCommit,
    build_push_command,
    upload_files,
)
from modeling_vitcls.runtime.files import read_json


EXAMPLES_FOLDER = "examples"

# Libraries that the app and the model's code import. The SDK of the Space contains gradio.
REQUIRED_LIBRARIES = "huggingface_hub numpy pillow safetensors torch torchvision transformers"

APP_TEMPLATE = '''"""Label photos with a model of the Hub."""

from pathlib import Path

import gradio
from transformers import pipeline


MODEL = {model!r}
# The app runs the code of the model. Review the code before you change the commit.
COMMIT = {commit!r}

if __name__ == "__main__":
    classifier = pipeline(
        "image-classification", model=MODEL, revision=COMMIT, trust_remote_code=True
    )
    examples = [[str(file)] for file in sorted(Path(__file__).parent.glob("{examples}/*"))]


    def predict(photo):
        return {{row["label"]: row["score"] for row in classifier(photo, top_k=5)}}

    page = gradio.Interface(
        predict,
        gradio.Image(type="pil"),
        gradio.Label(num_top_classes=5),
        title=MODEL,
        examples=examples or None,
        cache_examples=False,
        api_name="predict",
    )
    page.launch()
'''

DESCRIPTION_TEMPLATE = """
Upload an image to see the labels that the Vision Transformer [{model}]({url}) predicts.

The model is loaded at commit [`{commit}`]({url}/tree/{commit}). The commit is set in `app.py`.
To run this page on your own machine: `pip install gradio=={gradio} -r requirements.txt`, then
`python app.py`.
"""


def find_published_model(source: str) -> ModelInfo:
    """Look up a model on the Hub by its id, with an optional `@REVISION`.

    A revision is a commit hash, a branch or a tag.

    Raise ValueError if `source` is a local folder, if the model is not on the Hub, or if it is not
    a vitcls model with code and an image processor, and OSError if the Hub does not respond.
    """
    repo_id, _ = split_revision(source)
    if Path(repo_id).is_dir():
        command = build_push_command(Path(repo_id), f"YOUR-NAME/{Path(repo_id).resolve().name}")
        raise ValueError(
            f"a Space requires a model on the Hub, but {repo_id} is a folder. Push the folder "
            f"first: {command}"
        )
    check_is_online()
    folder = Path(get_model_folder(source, CONFIG_FILES))
    model = HfApi().model_info(repo_id, revision=folder.name)
    config_dict = read_json(folder / CONFIG_FILE)
    code_references = list_code_references(config_dict.get("auto_map"))
    if config_dict.get("model_type") != ViTCLSConfig.model_type or not code_references:
        raise ValueError(
            f"{repo_id} at {model.sha} does not contain a {ViTCLSConfig.model_type} model with its "
            "code. Convert the model with `vitcls convert` and push the result"
        )
    if not any("Classification" in name for name in config_dict.get("architectures") or ()):
        raise ValueError(f"a Space requires a classifier, but {repo_id} is an encoder")
    if not (folder / PROCESSOR_FILE).is_file():
        raise ValueError(
            f"{repo_id} has no preprocessor_config.json. Save the image processor next to the model"
        )
    return model


def write_space(folder: Path, model: ModelInfo, examples: Sequence[Path] = ()) -> None:
    """Write the files of the Space to a folder. Raise ValueError if gradio is not installed."""
    try:
        gradio_version = importlib.metadata.version("gradio")
    except importlib.metadata.PackageNotFoundError:
        raise ValueError(
            "the Space uses the installed version of gradio, but gradio is not installed. Run `pip "
            "install gradio`"
        ) from None
    settings = {
        "sdk": "gradio",
        "sdk_version": gradio_version,
        # The default version on the Hub is too old.
        "python_version": f"{sys.version_info.major}.{sys.version_info.minor}",
        "app_file": "app.py",
    }
    card = build_space_card(model, DESCRIPTION_TEMPLATE, settings, gradio=gradio_version)
    requirements = [
        Requirement(line) for line in importlib.metadata.requires("modeling_vitcls") or ()
    ]
    specifiers = {
        requirement.name: str(requirement.specifier)
        for requirement in requirements
        if requirement.specifier
    }
    folder.mkdir(parents=True, exist_ok=True)
    for index, file in enumerate(examples):
        (folder / EXAMPLES_FOLDER).mkdir(exist_ok=True)
        shutil.copyfile(file, folder / EXAMPLES_FOLDER / f"{index}_{file.name}")
    app_code = APP_TEMPLATE.format(model=model.id, commit=model.sha, examples=EXAMPLES_FOLDER)
    (folder / "app.py").write_text(app_code, encoding="utf-8")
    (folder / "README.md").write_text(card, encoding="utf-8")
    requirements_text = "".join(
        f"{name}{specifiers[name]}\n" for name in REQUIRED_LIBRARIES.split()
    )
    (folder / "requirements.txt").write_text(requirements_text, encoding="utf-8")


def build_space_card(
    model: ModelInfo, description: str, settings: dict[str, Any], **fields: str
) -> str:
    """Return the text of README.md, whose header configures the Space.

    `description` is a template with the placeholders `model`, `commit`, `url` and the names in
    `fields`.
    """
    title = f"{model.id.partition('/')[2]}: labels of a photo"
    header = SpaceCardData(
        title=title,
        emoji="🔎",
        colorFrom="indigo",
        colorTo="gray",
        models=[model.id],
        tags=["vision", "vit", "vitcls"],
        short_description="Labels that a Vision Transformer predicts",
        license="apache-2.0",  # of the page
        **settings,
    )
    url = f"{constants.ENDPOINT}/{model.id}"
    text = description.format(model=model.id, commit=model.sha, url=url, **fields)
    return str(SpaceCard(f"---\n{header.to_yaml()}\n---\n# {title}\n{text}"))


def push_space(folder: Path, model: ModelInfo, space_id: str) -> PushedCommit:
    """Push the files of a Space.

    Outdated files in the same folders are removed, and all other files are kept.

    Call this function after `prepare_repository(..., space_sdk=...)`. If nothing has changed, no
    commit is made. Raise PushError if the push fails. The message is a single line and ends with
    the remedy.
    """
    subfolders = {EXAMPLES_FOLDER, *(file.name for file in folder.iterdir() if file.is_dir())}
    message = f"Show {model.id} at {str(model.sha)[:7]}"
    delete_patterns = [f"{name}/*" for name in subfolders]
    files = {
        file.relative_to(folder).as_posix(): file for file in folder.rglob("*") if file.is_file()
    }
    destination = Destination(repo_id=space_id, repo_type="space", message=message)
    return upload_files(files, destination, delete_patterns, "Repeat the command")
