"""`vitcls demo`: serve a web page that shows the predictions for images and the attention of the special tokens.

    vitcls demo --model runs/mine
    vitcls demo --model someone/their-model@COMMIT --port 8000

`scripts/push_space.py` publishes the same page on the Hub. The page is implemented in demo_page.py.
"""

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from ..runtime.errors import describe_installation


@dataclass(frozen=True)
class DemoOptions:
    """Serve a web page that shows the predictions and attention of a model."""

    model: str
    """Folder or Hub id of a vitcls model (`ID@COMMIT` pins the model), or another ViT, which is converted once."""
    examples: tuple[Path, ...] = ()
    """Image files to show as examples."""
    host: str = "127.0.0.1"
    """Address of the server. 0.0.0.0 allows connections from other machines."""
    port: int | None = None
    """Port of the server. Default: the first free port from 7860 upward."""
    backend: str = "torch"
    """Engine: `torch`, or `onnx` or `openvino` for model.onnx or model.xml in the model's folder, which then
    requires no other weights, or a file that `vitcls export` wrote. Exported files have no attention maps."""


OPTIONS_CLASS = DemoOptions


def run(options: DemoOptions) -> None:
    """Load the model and serve the demo page. Raise ValueError if gradio is not installed."""
    if find_spec("gradio") is None:
        raise ValueError(f"vitcls demo requires gradio. {describe_installation('demo')}")
    from ..conversion.any_checkpoint import resolve_checkpoint
    from ..hub.loading import force_offline
    from ..inference.load_model import list_file_patterns, load_model

    folder = resolve_checkpoint(options.model, list_file_patterns(options.backend))
    with force_offline():  # all files are local at this point
        model, processor = load_model(folder, use_head=None, backend=options.backend)
        from .demo_page import serve_demo  # importing gradio is slow

        serve_demo(
            model.eval(), processor, options.model, options.examples, options.host, options.port
        )
