# /// script
# requires-python = ">=3.11"
# dependencies = ["modeling_vitcls[demo]"]
#
# [tool.uv.sources]
# modeling_vitcls = { path = "..", editable = true }
# ///
"""Publish a Space that labels photos with a model on the Hub.

    python scripts/push_space.py --model me/my-model --space-id me/my-model-demo
    python scripts/push_space.py --model me/my-model --output space      # only write the files
    python scripts/push_space.py --model me/my-model --static            # the model runs in the browser

`vitcls demo` serves a page on your own machine. The Spaces are implemented in space/.
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from modeling_vitcls.cli.export import silence_exporters
from modeling_vitcls.cli.parsing import run_script
from modeling_vitcls.runtime.flags import Options


if TYPE_CHECKING:
    from huggingface_hub import ModelInfo


@dataclass(frozen=True)
class SpaceOptions(Options):
    """Publish a Space that labels photos with a classifier on the Hub."""

    model: str
    """Hub id of the model, optionally with @REVISION (commit, branch or tag; default: main). The
    Space is pinned to that commit."""
    space_id: str | None = None
    """Id of the Space to push to. Default: a Space in your account, named after the model with the
    suffix -demo."""
    private: bool = False
    """If the Space does not exist, create it as a private Space."""
    examples: tuple[Path, ...] = ()
    """Image files to show as examples."""
    static: bool = False
    """Build a page that runs a copy of the model in the browser, with transformers.js, and shows the
    attention of the CLS tokens."""
    output: Path | None = None
    """Write the files of the Space to this folder instead of pushing them."""

    def check(self) -> None:
        if self.output is not None and (self.space_id is not None or self.private):
            raise ValueError(
                "--space-id and --private apply to pushes. Remove --output, which prevents the push"
            )
        if self.static and self.examples:
            raise ValueError("--static does not support --examples. Omit one of these flags")


def run(options: SpaceOptions) -> None:
    """Write the files of a Space for a model, push them, and print the URL or folder."""
    from space.space import find_published_model, push_space

    from modeling_vitcls.publishing.push import prepare_repository
    from modeling_vitcls.runtime.staging import check_output_is_empty

    model = find_published_model(options.model)
    needs_token = model.private or model.gated
    if options.static and needs_token and not options.private and options.output is None:
        raise ValueError(
            f"a public static Space would publish the weights of {model.id}, which is private "
            "or gated. Set --private"
        )
    if options.output is not None:
        check_output_is_empty(options.output)
        write_files(options, model, options.output)
        arguments = (
            f"-m http.server --directory {options.output}"
            if options.static
            else options.output / "app.py"
        )
        print(f"wrote {options.output}: to serve the page, run python {arguments}")
        return
    default_name = f"{model.id.rpartition('/')[2]}-demo"
    sdk = "static" if options.static else "gradio"
    with tempfile.TemporaryDirectory() as folder:
        write_files(options, model, Path(folder))
        space_id = prepare_repository(options.space_id, default_name, options.private, sdk)
        pushed_space = push_space(Path(folder), model, space_id)
    print(f"pushed a Space for {model.id} at {model.sha}: {pushed_space.url}")
    if needs_token and not options.static:
        print(
            f"{model.id} is private or gated: at {pushed_space.url}/settings, add a token "
            "with read access to the model as the secret HF_TOKEN"
        )


def write_files(options: SpaceOptions, model: "ModelInfo", folder: Path) -> None:
    """Write the files of the Space to a folder."""
    if not options.static:
        from space.space import write_space

        write_space(folder, model, options.examples)
        return
    from space.static_space import MODEL_FOLDER, write_static_space
    from space.transformers_js import export_for_transformers_js

    silence_exporters()
    export_for_transformers_js(f"{model.id}@{model.sha}", folder / MODEL_FOLDER)
    write_static_space(folder, model)


if __name__ == "__main__":
    run_script(SpaceOptions, run)
