"""The page of the demo: a picture in, labels and attention out.

    show("someone/model", revision)        # serves the page until it is stopped

The model is asked once per picture; another token, layer or head only draws again from what it said. The page loads
nothing from other hosts: no analytics, no fonts. What the model says is from reader.py, the words from text.py.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from .reader import Reader, Reading
from .text import MEAN_OF_HEADS, attention_in_words, header, how_to_load, title, what_is_missing


# Both are read when gradio is imported or launched: no statistics are sent, and browsers keep no pictures.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
os.environ["GRADIO_RUN_HISTORY"] = "False"

import gradio as gr


TOP_K = 5
SECONDS_KEPT = 3600  # of pictures and what was made of them
PICTURE_HEIGHT = 360  # pixels
NOT_UPLOADED = "the picture has to be uploaded to this page, or one of its examples"
# What is asked for last is also drawn last: gradio would forget what is asked for while something is being drawn, and
# draw for two reasons at once.
LAST: dict[str, Any] = {"trigger_mode": "always_last"}
LAST_IN_TURN: dict[str, Any] = LAST | {"concurrency_id": "drawing"}

SYSTEM_FONTS: dict[str, Any] = {
    "font": ("system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"),
    "font_mono": ("ui-monospace", "Menlo", "Consolas", "monospace"),
}
# The maps of all layers keep a size at which they can be told apart, in as many columns as there is room for.
CSS = """
#problem { border-left: 4px solid #dc2626; padding-left: 0.75rem; }
#layers .grid-container { grid-template-columns: repeat(auto-fill, minmax(120px, 1fr)); }
"""


def show(
    source: str,
    revision: str | None = None,
    examples: Sequence[str | Path] = (),
    host: str | None = None,
    port: int | None = None,
    code_revision: str | None = None,
) -> None:
    """Load a model and serve its page, until the process is stopped.

    Args:
        source: a folder, or a repository's id.
        revision: commit hash, branch or tag.
        examples: picture files to try it with.
        host: to listen at; None: GRADIO_SERVER_NAME, which Spaces set, or this machine alone.
        port: None: GRADIO_SERVER_PORT, or a free one from 7860 on.
        code_revision: commit hash, branch or tag, where the code is in a repository of its own.

    Raises:
        ValueError, OSError: in one line, for models that cannot be shown, and ports that are taken.
    """
    page = build_page(Reader.load(source, revision, code_revision), examples)
    try:
        address = launch(page, host, port)
    except OSError as error:  # gradio names its own functions
        raise OSError(f"cannot listen at port {port or '7860 or above'}: give another --port that is free") from error
    print(f"{source}: {address}", flush=True)
    page.block_thread()


def launch(page: gr.Blocks, host: str | None = None, port: int | None = None) -> str:
    """Serve the page from threads of this process; gives its address."""
    _, address, _ = page.launch(
        server_name=host,
        server_port=port,
        theme=gr.themes.Default(**SYSTEM_FONTS),
        css=CSS,
        footer_links=["gradio", "settings"],
        share=False,
        ssr_mode=False,
        prevent_thread_lock=True,
        quiet=True,
    )
    return address


def build_page(reader: Reader, examples: Sequence[str | Path] = ()) -> gr.Blocks:
    """The page of a model, not served yet."""
    with gr.Blocks(title=title(reader), analytics_enabled=False, delete_cache=(SECONDS_KEPT, SECONDS_KEPT)) as page:
        gr.Markdown(header(reader))
        with gr.Accordion("How to load this model", open=False):
            gr.Markdown(how_to_load(reader))
        with gr.Row():
            with gr.Column():
                question = Question(examples)
            with gr.Column():
                labels = [
                    gr.Label(label=name, num_top_classes=TOP_K, show_heading=reader.has_winner)
                    for name in reader.questions
                ]
                if missing := what_is_missing(reader):
                    gr.Markdown(missing)
        reading = gr.State(time_to_live=SECONDS_KEPT)
        view = AttentionView(reader, reading) if reader.shows_attention else None

        def ask(file: dict[str, Any] | None) -> list[Any]:
            picture, problem, answered = question.ask(reader, file)
            answers = list(answered.answers.values()) if answered else [None] * len(labels)
            return [picture, problem, *answers, answered]

        outputs = [question.picture, question.problem, *labels, reading]
        for listen in question.events:
            asked = listen(ask, [question.picture], outputs, preprocess=False, **LAST)
            if view is not None:
                asked.then(view.draw_all, view.inputs, view.outputs, **LAST_IN_TURN)
    return page


class Question:
    """Where a picture is given, and what is wrong with it.

    What the browser tells of a file is not to be trusted: whoever talks to the server by himself may name any path or
    address there. Only files that were uploaded, and the examples, are opened.
    """

    def __init__(self, examples: Sequence[str | Path]) -> None:
        self.picture = gr.Image(
            label="Picture", type="filepath", sources=["upload", "clipboard"], height=PICTURE_HEIGHT
        )
        keep = self.picture.async_move_resource_to_block_cache

        async def keep_uploaded(path_or_url: str | Path | None) -> str | None:
            """gradio would fetch an address that a client names, from wherever this runs."""
            if str(path_or_url).startswith(("http:", "https:")):
                raise gr.Error(NOT_UPLOADED)
            return await keep(path_or_url)

        # On the object: for a class of its own gradio writes a file beside this one.
        self.picture.async_move_resource_to_block_cache = keep_uploaded  # type: ignore[method-assign,assignment]
        self.problem = gr.Markdown(visible=False, elem_id="problem")
        self.events = [self.picture.input]
        self.examples = {os.path.realpath(file) for file in examples}
        if examples:
            tried = gr.Examples([[str(file)] for file in examples], [self.picture])
            self.events.append(tried.load_input_event.then)

    def ask(self, reader: Reader, file: dict[str, Any] | None) -> tuple[Any, Any, Reading | None]:
        """What becomes of `picture` and `problem`, and what the model says; None without a picture.

        `file` is what the browser tells: gradio's own reading of it has no words for a file that is no picture.
        """
        no_problem = gr.Markdown("", visible=False)
        if file is None:
            return gr.skip(), no_problem, None
        picture = self.uploaded(file.get("path"))
        if picture is None:
            return None, gr.Markdown(f"**No answer:** {NOT_UPLOADED}.", visible=True), None
        try:
            return gr.skip(), no_problem, reader.read(picture)
        except ValueError as error:
            message = str(error).replace(picture, file.get("orig_name") or "the file")
            return None, gr.Markdown(f"**No answer:** {message}.", visible=True), None

    def uploaded(self, path: Any) -> str | None:
        """Where a file really is, if it was uploaded or is an example; None for whatever else, or for none at all."""
        if not isinstance(path, str) or "\0" in path:
            return None
        real = Path(os.path.realpath(path))
        is_ours = str(real) in self.examples or real.is_relative_to(os.path.realpath(self.picture.GRADIO_CACHE))
        return str(real) if is_ours and real.is_file() else None


class AttentionView:
    """The choice of a token, a layer and heads, and what is drawn for it."""

    def __init__(self, reader: Reader, reading: gr.State) -> None:
        self.reader = reader
        tokens, num_layers = reader.tokens, reader.num_layers
        gr.Markdown("## What the special tokens look at")
        token = gr.Radio(tokens, value=tokens[0], type="index", label="Token")
        with gr.Row():
            layer = gr.Slider(
                1, num_layers, value=num_layers, step=1, label="Layer", visible=num_layers > 1, min_width=240
            )
            head = gr.Dropdown(
                [MEAN_OF_HEADS, *reader.heads], value=MEAN_OF_HEADS, type="index", label="Heads", min_width=240
            )
        with gr.Row():
            with gr.Column():
                drawn = gr.Image(
                    label="Attention to the picture",
                    show_label=False,
                    interactive=False,
                    buttons=["download", "fullscreen"],
                    elem_id="map",
                )
                words = gr.Markdown(elem_id="shares")
            with gr.Column():
                layers = gr.Gallery(
                    label="The same token and heads in all layers",
                    show_label=False,
                    allow_preview=False,
                    object_fit="contain",
                    height="auto",
                    buttons=[],
                    elem_id="layers",
                )
                gr.Markdown("All layers, each on a scale of its own. Click one to see it large.")
        self.inputs = [reading, token, layer, head]
        self.outputs = [drawn, words, layers]
        for choice in (token, head):
            choice.input(self.draw_all, self.inputs, self.outputs, show_progress="hidden", **LAST_IN_TURN)
        layer.change(self.draw, self.inputs, [drawn, words], show_progress="hidden", **LAST_IN_TURN)
        layers.select(layer_of, None, layer, show_progress="hidden")

    def draw(self, reading: Reading | None, token: int, layer: int, head: int) -> tuple[Image.Image | None, str]:
        """The map of one layer, and where all of the token's attention goes. Layers and heads count from 1."""
        if reading is None:
            return None, ""
        place = token, layer - 1, head - 1 if head else None
        return reading.drawn(*place), attention_in_words(self.reader, *place, reading.shares(*place))

    def draw_all(
        self, reading: Reading | None, token: int, layer: int, head: int
    ) -> tuple[Image.Image | None, str, list[tuple[Image.Image, str]]]:
        """The same, and the maps of all layers in small."""
        if reading is None:
            return None, "", []
        maps = reading.drawn_layers(token, head - 1 if head else None)
        named = [(small, f"layer {number}") for number, small in enumerate(maps, start=1)]
        return *self.draw(reading, token, layer, head), named


def layer_of(event: gr.SelectData) -> int:
    """The layer whose map was clicked."""
    return event.index + 1
