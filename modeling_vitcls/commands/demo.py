"""`vitcls demo`: a page with the labels of images and the attention of every special token.

    python scripts/demo_app.py --model runs/mine
    python scripts/demo_app.py --model someone/their-model --revision COMMIT --port 8000

`vitcls space` publishes the same page on the Hub. The page is implemented in modeling_vitcls/demo/.
"""

from dataclasses import dataclass
from pathlib import Path

from .parsing import errors_in_one_line


@dataclass(frozen=True)
class DemoOptions:
    """Show in a browser what a model sees in pictures."""

    model: str
    """Folder of a model, or its id on the Hub."""
    revision: str | None = None
    """Commit hash, branch or tag on the Hub. Default: the newest commit."""
    examples: tuple[Path, ...] = ()
    """Picture files to offer."""
    host: str = "127.0.0.1"
    """Address to listen at; 0.0.0.0 lets other machines in."""
    port: int | None = None
    """Default: the first that is free from 7860 on."""


OPTIONS = DemoOptions


def run(options: DemoOptions) -> None:
    """Load the model and serve the page."""
    from transformers.utils.logging import disable_progress_bar

    from ..hub.loading import force_offline, get_cached_commit, get_model_folder

    disable_progress_bar()  # for loading weights
    with errors_in_one_line():
        folder = get_model_folder(options.model, revision=options.revision)
        from ..demo.page import serve_demo  # gradio takes seconds to import

        with force_offline():  # all files are local now
            serve_demo(options.model, get_cached_commit(folder), options.examples, options.host, options.port)
