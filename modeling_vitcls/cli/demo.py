"""`vitcls demo`: serve a web page that labels a photo and shows its sheet."""

import os
import socket
import warnings
from contextlib import closing
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..runtime.errors import describe_installation
from ..runtime.flags import Options


HEIC_ENDINGS = (".heic", ".heif")
# The sheet is as wide as the window.
CSS = """
.gradio-container main .row { flex-direction: column; }
.gradio-container main .column { width: 100%; }
"""
# The limits of docs/serving.md
MAX_FILE_SIZE = "20mb"
MAX_PIXELS = 50_000_000
CACHE_SECONDS = 3600  # Uploads are deleted after this time
NUM_LABELS = 5  # Maximum number of labels with a probability
MAX_NAMES = 12  # Maximum number of class names in the answer "none of these"
NONE_OF_THESE = "none of these"  # Shown for a photo of none of the classes


@dataclass(frozen=True, kw_only=True)
class DemoOptions(Options):
    """Serve a web page that labels photos and shows what the tokens of the model look at."""

    model: str
    """Folder or Hub id of a vitcls model (`ID@COMMIT` pins the model), or another ViT, which is
    converted once. The model must be a classifier."""
    examples: tuple[Path, ...] = ()
    """Image files to show as examples."""
    host: str = "127.0.0.1"
    """Address of the server. 0.0.0.0 allows connections from other machines."""
    port: int | None = None
    """Port of the server. Default: the first free port from 7860 upward."""


def run_demo(options: DemoOptions) -> None:
    """Serve a web page that labels a photo and shows its sheet.

    Examples:
        vitcls demo --model runs/mine
        vitcls demo --model someone/their-model@COMMIT --port 8000

    photo  ->  for each task: the probabilities of the labels, or none of them  ->  the sheet of `vitcls look`
    """
    if find_spec("gradio") is None:
        raise ValueError(f"vitcls demo requires gradio. {describe_installation('demo')}")
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # Read on import
    import gradio
    from PIL import Image

    # Pillow refuses twice as many pixels before it decodes them, also in an icon's PNG, and warns
    # of fewer
    Image.MAX_IMAGE_PIXELS = MAX_PIXELS // 2
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)
    page = build_page(options)
    try:
        # `quiet` hides gradio's line, and `prevent_thread_lock` returns, so we print the address.
        _, address, _ = page.launch(
            server_name=options.host,
            server_port=options.port or None,
            share=False,
            ssr_mode=False,
            prevent_thread_lock=True,
            quiet=True,
            show_error=True,
            # Fonts of the system: the page loads none from other hosts
            theme=gradio.themes.Default(
                font=("system-ui", "sans-serif"), font_mono=("ui-monospace", "monospace")
            ),
            css=CSS,
            footer_links=["gradio"],
            max_file_size=MAX_FILE_SIZE,
        )
    except (OSError, OverflowError) as error:  # gradio's message does not mention --port
        raise OSError(
            f"Cannot open port {options.port or '7860 or above'}. Set --port to a free port."
        ) from error
    print(f"{options.model}: {address}", flush=True)
    if options.host == "0.0.0.0":
        print(
            f"for other devices in this network: http://{find_own_address()}:{page.server_port}/",
            flush=True,
        )
    page.block_thread()


def find_own_address() -> str:
    """Find the address of this machine in its network; nothing is sent."""
    with closing(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # An address for documentation (RFC 5737)
        except OSError:  # No network
            return "localhost"
        return probe.getsockname()[0]  # type: ignore[no-any-return]


def build_page(options: DemoOptions) -> Any:
    """Load the model, and build the page as a `gradio.Interface`."""
    import gradio

    from ..analysis.pages import render
    from ..analysis.photo import measure_photo
    from ..analysis.sheet import build_sheet
    from ..analysis.token_use import find_token_use
    from ..hub.local_paths import get_title
    from ..inference.predictor import Predictor
    from ..model.image_processing_vitcls import read_image

    title = get_title(options.model)
    predictor = Predictor(options.model, top_k=NUM_LABELS)
    columns: Any = predictor.columns
    tasks = columns.tasks
    use = find_token_use(predictor.model)

    def answer(file: str | None) -> list[Any]:
        if file is None:
            raise gradio.Error("select a photo", print_exception=False)
        # Bytes, because errors would show the path of the temporary copy on the server
        photo = Path(file).read_bytes()
        (row,) = predictor([photo])
        if row["error"]:
            raise gradio.Error(row["error"], print_exception=False)
        answers = [read_answer(row, task) for task in tasks.values()]
        measured = measure_photo(predictor.model, predictor.processor, read_image(photo), use)
        # The sheet shows the numbers of the row, which may be computed in another precision
        measured = replace(
            measured,
            predictions={
                task or None: task_columns.read(row) for task, task_columns in tasks.items()
            },
            is_unknown=bool(row.get("unknown")),
        )
        sheet = build_sheet(measured, bool(row["trained"]))
        return [*answers, render("demo.html.j2", sheet=sheet)]

    answers = [gradio.Label(label=task or "Answer", num_top_classes=NUM_LABELS) for task in tasks]
    # `gradio.Image` would refuse HEIC if the browser lacks the type, and decode the file itself, but
    # `vitcls predict` reads more formats and names what is wrong.
    photo_input = gradio.File(label="Photo", file_types=["image", *HEIC_ENDINGS], type="filepath")
    sheet = gradio.HTML(elem_id="sheet")
    return gradio.Interface(
        answer,
        photo_input,
        [*answers, sheet],
        examples=[[str(file)] for file in options.examples] or None,
        cache_examples=False,
        title=title,
        flagging_mode="never",
        delete_cache=(CACHE_SECONDS, CACHE_SECONDS),
        api_name="predict",
    )


def read_answer(row: dict[str, Any], columns: Any) -> dict[str, float] | str:
    """Read the probabilities of the most probable labels of a task, or that the photo has none.

    Args:
        row: The row of a photo, as in `vitcls predict --top-k`.
        columns: The columns of the task (inference/prediction_rows.py).
    """
    from ..runtime.errors import format_name_list

    labels = columns.read(row)
    if not labels or row.get(columns.name_column("unknown")):
        return f"{NONE_OF_THESE}: {format_name_list(columns.head.labels, MAX_NAMES)}"
    return dict(labels)
