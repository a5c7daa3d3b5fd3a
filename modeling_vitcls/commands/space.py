"""`vitcls space`: publish a Space with the labels of images and the attention of every special token.

    vitcls space --model me/my-model --space-id me/my-model-demo
    vitcls space --model me/my-model --output space      # only write its files

`vitcls demo` shows the same page on this machine. The Space is implemented in modeling_vitcls/hub/space.py.
"""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class SpaceOptions:
    """Publish a Space with the predictions and attention of a model on the Hub."""

    model: str
    """Hub id of the model."""
    revision: str = "main"
    """Commit hash, branch or tag. A branch or tag is resolved to its current commit, which the Space keeps using."""
    space_id: str | None = None
    """Space to push to. Default: the name of the model with -demo, in your account."""
    private: bool = False
    """Make the Space private if it is created."""
    title: str | None = None
    """Title of the Space. Default: derived from the name of the model."""
    examples: tuple[Path, ...] = ()
    """Image files to offer as examples."""
    output: Path | None = None
    """Write the files of the Space to this folder instead of pushing them."""

    def __post_init__(self) -> None:
        if self.output is not None and (self.space_id is not None or self.private):
            flag = "--space-id" if self.space_id is not None else "--private"
            raise ValueError(f"--output pushes nothing, but {flag} only applies to pushes. Omit one of them")


OPTIONS = SpaceOptions


def run(options: SpaceOptions) -> None:
    """Find the model, build the files of the Space, push or write the files, and print their location."""
    from ..hub.push_permissions import check_push_permissions
    from ..hub.space import build_space_files, find_published_model, push_space, write_space

    model = find_published_model(options.model, options.revision)
    contents = build_space_files(model, options.title, options.examples)
    if options.output is not None:
        write_space(contents, options.output)
        print(f"wrote {options.output}: run it with python {options.output / 'app.py'}")
        return
    default_name = f"{model.repo_id.rpartition('/')[2]}-demo"
    space_id = check_push_permissions(options.space_id, default_name, options.private, repo_type="space")
    pushed = push_space(contents, model, space_id, options.private, options.title)
    print(f"pushed {model.repo_id} at {model.commit} as {pushed.url}")
    if model.needs_token:
        print(
            f"{model.repo_id} is private or gated: add a secret HF_TOKEN with read access to the Space, at "
            f"{pushed.url}/settings"
        )
