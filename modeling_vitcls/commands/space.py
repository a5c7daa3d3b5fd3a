"""`vitcls space`: publish a Space that shows the predictions for images and the attention of the special tokens.

    vitcls space --model me/my-model --space-id me/my-model-demo
    vitcls space --model me/my-model --output space      # only write the files
    vitcls space --model me/my-model --static            # the model runs in the browser

`vitcls demo` serves the page locally. The Space is implemented in modeling_vitcls/publishing/space.py, and a
static Space in publishing/static_space.py.
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ..options import to_arguments
from .export import silence_exporters


if TYPE_CHECKING:
    from ..publishing.manifest import RepoFiles
    from ..publishing.space import PublishedModel


@dataclass(frozen=True)
class SpaceOptions:
    """Publish a Space that shows the predictions and attention of a model on the Hub."""

    model: str
    """Hub id of the model."""
    revision: str = "main"
    """Commit hash, branch or tag. For a branch or tag, the Space is pinned to the current commit."""
    space_id: str | None = None
    """Id of the Space to push to. Default: a Space in your account, named after the model with the suffix -demo."""
    private: bool = False
    """If the Space does not exist, create it as a private Space."""
    title: str | None = None
    """Title of the Space. Default: derived from the name of the model."""
    examples: tuple[Path, ...] = ()
    """Image files to show as examples."""
    static: bool = False
    """Build a page that runs a copy of the model in the browser, with transformers.js. The model must have a
    classifier."""
    node_modules: Path | None = None
    """With --static: node_modules folder that contains @huggingface/transformers. The package is copied to the Space.
    Default: the page loads transformers.js from a CDN."""
    output: Path | None = None
    """Write the files of the Space to this folder instead of pushing them."""

    def __post_init__(self) -> None:
        if self.output is not None and (self.space_id is not None or self.private):
            flag = "--space-id" if self.space_id is not None else "--private"
            raise ValueError(f"--output pushes nothing, but {flag} applies only to pushes. Omit one of these flags")
        if self.static and self.examples:
            raise ValueError("--static does not support --examples. Omit one of these flags")
        if self.node_modules is not None and not self.static:
            raise ValueError("--node-modules requires --static. Set --static")


OPTIONS_CLASS = SpaceOptions


def run(options: SpaceOptions) -> None:
    """Build the files of a Space for a model, push or write the files, and print the URL or folder."""
    from ..publishing.space import build_space_files, find_published_model

    model = find_published_model(options.model, options.revision)
    if not options.static:
        publish(options, model, build_space_files(model, options.title, options.examples))
        return
    from ..export.transformers_js import export_for_transformers_js
    from ..publishing.static_space import build_static_space_files

    if model.needs_token and not options.private and options.output is None:
        raise ValueError(
            f"a public static Space would publish the weights of {model.repo_id}, which is private or gated. "
            "Set --private"
        )
    silence_exporters()
    with tempfile.TemporaryDirectory() as export_folder:
        export_for_transformers_js(f"{model.repo_id}@{model.commit}", Path(export_folder))
        files = build_static_space_files(model, Path(export_folder), options.title, options.node_modules)
        publish(options, model, files)


def publish(options: SpaceOptions, model: "PublishedModel", space_files: "RepoFiles") -> None:
    """Push or write the files of a Space, and print the URL or folder."""
    from ..publishing.push_permissions import check_push_permissions
    from ..publishing.space import push_space, write_space

    if options.output is not None:
        write_space(space_files, options.output)
        arguments = f"-m http.server --directory {options.output}" if options.static else options.output / "app.py"
        print(f"wrote {options.output}: to serve the page, run python {arguments}")
        return
    default_name = f"{model.repo_id.rpartition('/')[2]}-demo"
    space_id = check_push_permissions(options.space_id, default_name, options.private, repo_type="space")
    flag_values = {name: getattr(options, name) for name in ("title", "examples", "static", "node_modules")}
    flags = [argument for name, value in flag_values.items() if value for argument in to_arguments(name, value)]
    sdk: Literal["gradio", "static"] = "static" if options.static else "gradio"
    pushed_space = push_space(space_files, model, space_id, options.private, sdk, flags)
    print(f"pushed a Space for {model.repo_id} at {model.commit}: {pushed_space.url}")
    if model.needs_token and not options.static:
        print(
            f"{model.repo_id} is private or gated: at {pushed_space.url}/settings, add a token with read access to "
            "the model as the secret HF_TOKEN"
        )
