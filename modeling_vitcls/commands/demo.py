"""`vitcls demo`: serve a web page that shows the predictions for images and the attention of the special tokens.

    vitcls demo --model runs/mine
    vitcls demo --model someone/their-model --revision COMMIT --port 8000

`vitcls space` publishes the same page on the Hub. The page is implemented in modeling_vitcls/demo/.
"""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class DemoOptions:
    """Serve a web page that shows the predictions and attention of a model."""

    model: str
    """Folder or Hub id of a vitcls model."""
    revision: str | None = None
    """Commit hash, branch or tag on the Hub. Default: the newest commit."""
    examples: tuple[Path, ...] = ()
    """Image files to show as examples."""
    host: str = "127.0.0.1"
    """Address of the server. 0.0.0.0 allows connections from other machines."""
    port: int | None = None
    """Port of the server. Default: the first free port from 7860 upward."""


OPTIONS_CLASS = DemoOptions


def run(options: DemoOptions) -> None:
    """Load the model and serve the demo page."""
    from transformers.utils.logging import disable_progress_bar

    from ..hub.loading import force_offline, get_cached_commit, get_model_folder

    disable_progress_bar()  # hides the progress bar of weight loading
    folder = get_model_folder(options.model, revision=options.revision)
    from ..demo.page import serve_demo  # importing gradio is slow

    with force_offline():  # all files are local at this point
        serve_demo(options.model, get_cached_commit(folder), options.examples, options.host, options.port)
