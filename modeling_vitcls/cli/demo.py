"""`vitcls demo`: serve a web page that shows predictions and the attention of the tokens.

    vitcls demo --model runs/mine
    vitcls demo --model someone/their-model@COMMIT --port 8000

`scripts/push_space.py` publishes the same page on the Hub. The page is implemented in demo_page.py.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from ..runtime.errors import describe_installation
from ..runtime.messages import format_message


if TYPE_CHECKING:
    from ..hub.model_folder import ModelFolder

LOCAL_HOSTS = ("127.0.0.1", "localhost", "::1")  # no other machine can see the page
NUM_EXAMPLES = 8  # maximum number of held-out images
MAX_EXAMPLE_SIDE = 1024  # maximum length of the sides of a held-out image, in pixels
# Modes of Pillow that PNG files do not have
MODES_WITHOUT_PNG = ("CMYK", "YCbCr", "LAB", "HSV", "F")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class DemoOptions:
    """Serve a web page that shows the predictions and attention of a model."""

    model: str
    """Folder or Hub id of a vitcls model (`ID@COMMIT` pins the model), or another ViT, which is
    converted once."""
    examples: tuple[Path, ...] = ()
    """Image files to show as examples. Default: images that the run of the model held out, if its
    dataset is `digits` or local, and no other machine can see the page (`--host`)."""
    host: str = "127.0.0.1"
    """Address of the server. 0.0.0.0 allows connections from other machines."""
    port: int | None = None
    """Port of the server. Default: the first free port from 7860 upward."""
    backend: str = "auto"
    """Engine: `torch`, or `onnx` or `openvino` for model.onnx or model.xml in the model's folder,
    which then requires no other weights, or a file that `vitcls export` wrote. Exported files have
    no attention maps; `auto` is `torch` unless the folder only has such files."""


OPTIONS_CLASS = DemoOptions


def run(options: DemoOptions) -> None:
    """Load the model and serve the demo page. Raise ValueError if gradio is not installed."""
    if find_spec("gradio") is None:
        raise ValueError(f"vitcls demo requires gradio. {describe_installation('demo')}")
    from ..conversion.any_checkpoint import resolve
    from ..hub.loading import force_offline
    from ..hub.local_paths import get_title
    from ..inference.load_model import load_model

    folder = resolve(options.model, options.backend)
    # All files are local at this point.
    with force_offline(), TemporaryDirectory(prefix="vitcls-demo-") as examples_folder:
        model, processor = load_model(folder, use_head=None, backend=options.backend)
        examples: Sequence[Path] = options.examples
        if not examples and options.host in LOCAL_HOSTS:
            examples = write_examples(folder, Path(examples_folder))
        from .demo_page import serve_demo  # importing gradio is slow

        serve_demo(
            model=model.eval(),
            processor=processor,
            title=get_title(options.model),
            examples=examples,
            host=options.host,
            port=options.port,
        )


def write_examples(run: "ModelFolder", output: Path) -> list[Path]:
    """Write held-out images of the run of a model to a folder, and return their files.

    The images are drawn at random. There are none if the folder is not the output of a run, if the
    dataset would have to be downloaded, or if it cannot be read.
    """
    from ..data.evaluated_images import load_evaluation_data
    from ..data.held_out import read_held_out_record
    from ..data.images import UnreadableImage
    from ..hub.local_paths import BUILT_IN_DATASET, is_local
    from ..publishing.report import read_data_options

    data_options = read_data_options(run) if run.results else None
    if data_options is None:
        return []
    if data_options.dataset != BUILT_IN_DATASET and not is_local(data_options.dataset):
        return []
    try:
        record = read_held_out_record(run)
        data = load_evaluation_data(
            options=data_options,
            split=None,
            record=record,
            use_labels=run.architecture != "ViTCLSForMaskedImageModeling",  # as in training
            max_images=NUM_EXAMPLES,
        )
    except (OSError, ValueError) as error:
        logger.warning(
            format_message(f"the page has no examples: {error}. Set `examples` to image files")
        )
        return []
    if record is None or data.part.warning is not None:  # training may have used the images
        return []
    images = data.images.images
    files = []
    for index in range(len(images)):
        try:
            image = images[index]
        except UnreadableImage:
            continue
        if image.mode in MODES_WITHOUT_PNG:
            image = image.convert("RGB")
        image.thumbnail((MAX_EXAMPLE_SIDE, MAX_EXAMPLE_SIDE))
        files.append(output / f"{index + 1}.png")
        image.save(files[-1])
    return files
