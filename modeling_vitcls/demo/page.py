"""Demo page, built with gradio: the input is an image; the outputs are predictions and attention maps.

    serve_demo("someone/model", revision)        # serves the page until the process is stopped

The model runs once per image. If the user selects a different token, layer or head, only the maps are redrawn. The
page loads no files, such as fonts or analytics scripts, from other hosts.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib.colors import to_hex
from PIL import Image

from ..analysis.maps import COLORMAP
from .reader import DemoModel, DemoResult
from .text import (
    MEAN_OF_HEADS,
    build_header,
    build_loading_code,
    describe_attention,
    explain_missing_output,
    get_title,
)


# Disable usage statistics and the run history, which browsers store. gradio reads these variables on import or launch.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
os.environ["GRADIO_RUN_HISTORY"] = "False"

import gradio as gr


CACHE_SECONDS = 3600  # time until uploaded images and results are deleted, in seconds
UPLOAD_REQUIRED_MESSAGE = "upload an image to this page, or select an example image"
# Without "always_last", gradio drops requests that arrive while another request is running. A shared concurrency id
# prevents two drawing requests from running at the same time.
LISTENER_OPTIONS: dict[str, Any] = {"trigger_mode": "always_last"}
DRAWING_LISTENER_OPTIONS: dict[str, Any] = LISTENER_OPTIONS | {"concurrency_id": "drawing"}

SYSTEM_FONTS: dict[str, Any] = {
    "font": ("system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"),
    "font_mono": ("ui-monospace", "Menlo", "Consolas", "monospace"),
}
# Each gallery has as many columns as fit at the minimum column width.
CSS = """
#problem { border-left: 4px solid #dc2626; padding-left: 0.75rem; }
#layers .grid-container { grid-template-columns: repeat(auto-fill, minmax(120px, 1fr)); }
#through .grid-container { grid-template-columns: repeat(auto-fill, minmax(220px, 1fr)); }
#layers .grid-wrap, #through .grid-wrap { min-height: 0; height: auto; }
#through .grid-wrap { max-height: none; }
#input img { width: 100%; height: 100%; object-fit: contain; }
.scale { display: flex; gap: 0.5rem; align-items: center; font-size: 0.85rem; }
.scale i { flex: 0 1 160px; height: 10px; border-radius: 3px; background: linear-gradient(to right, COLORS); }
"""
# Without this script, browsers load images with loading=lazy only near the visible region, and other images are blank.
LOAD_ALL_IMAGES = """() => {
  const load = () => document.querySelectorAll("img[loading=lazy]").forEach((image) => { image.loading = "eager" })
  new MutationObserver(load).observe(document.body, { childList: true, subtree: true })
}"""
NUM_COLOR_STOPS = 9  # number of colors in the gradient of the color scale
PATCHES_TEXT = (
    "Similar colors mean similar features: red, green and blue are the first three principal components of the "
    "patch features of this image. Click a patch to see which patches are similar to it."
)


def serve_demo(
    source: str,
    revision: str | None = None,
    examples: Sequence[str | Path] = (),
    host: str | None = None,
    port: int | None = None,
    code_revision: str | None = None,
) -> None:
    """Load a model and serve its demo page until the process is stopped.

    Args:
        source: folder or Hub id.
        revision: commit hash, branch or tag.
        examples: example image files.
        host: host name of the server. Default: the environment variable GRADIO_SERVER_NAME, or localhost.
        port: port of the server. Default: GRADIO_SERVER_PORT, or the first free port from 7860 upward.
        code_revision: commit hash, branch or tag of the code, if the code is in a separate repository.

    Raises:
        ValueError, OSError: if the demo does not support the model, or the port is in use. The message is one line.
    """
    page = build_page(DemoModel.load(source, revision, code_revision), examples)
    try:
        address = launch_page(page, host, port)
    except OSError as error:  # gradio's message does not mention --port
        raise OSError(f"Cannot listen on port {port or '7860 or above'}. Set --port to a free port.") from error
    print(f"{source}: {address}", flush=True)
    page.block_thread()


def launch_page(page: gr.Blocks, host: str | None = None, port: int | None = None) -> str:
    """Serve the page in background threads and return the URL of the page."""
    color_stops = colormaps[COLORMAP]([index / (NUM_COLOR_STOPS - 1) for index in range(NUM_COLOR_STOPS)])
    _, address, _ = page.launch(
        server_name=host,
        server_port=port,
        theme=gr.themes.Default(**SYSTEM_FONTS),
        css=CSS.replace("COLORS", ", ".join(map(to_hex, color_stops))),
        footer_links=["gradio", "settings"],
        share=False,
        ssr_mode=False,
        prevent_thread_lock=True,
        quiet=True,
    )
    return address


def build_page(demo_model: DemoModel, examples: Sequence[str | Path] = ()) -> gr.Blocks:
    """Build the demo page for a model."""
    with gr.Blocks(
        title=get_title(demo_model), analytics_enabled=False, delete_cache=(CACHE_SECONDS, CACHE_SECONDS)
    ) as page:
        gr.Markdown(build_header(demo_model))
        with gr.Accordion("How to load this model", open=False):
            gr.Markdown(build_loading_code(demo_model))
        with gr.Row():
            with gr.Column():
                image_input = ImageInput(examples)
            with gr.Column():
                label_components = [
                    gr.Label(label=name, num_top_classes=5, show_heading=demo_model.has_top_label)
                    for name in demo_model.output_names
                ]
                if explanation := explain_missing_output(demo_model):
                    gr.Markdown(explanation)
        state = gr.State(time_to_live=CACHE_SECONDS)
        views: list[Any] = []
        if demo_model.token_names:
            views.append(AttentionView(demo_model, state))
        views.append(PatchView(demo_model, state))

        def predict(file: dict[str, Any] | None) -> list[Any]:
            image, error_message, result = image_input.predict(demo_model, file)
            predictions = list(result.predictions.values()) if result else [None] * len(label_components)
            return [image, error_message, *predictions, result]

        page.load(js=LOAD_ALL_IMAGES)
        outputs = [image_input.image, image_input.error_message, *label_components, state]
        if examples:
            load_event = page.load(lambda: str(examples[0]), None, image_input.image, show_progress="hidden")
            image_input.triggers.append(load_event.then)
        for trigger in image_input.triggers:
            event = trigger(predict, [image_input.image], outputs, preprocess=False, **LISTENER_OPTIONS)
            for view in views:
                event.then(view.draw_all, view.inputs, view.outputs, **DRAWING_LISTENER_OPTIONS)
        for api_function in page.fns.values():  # only `predict` is public in the API of the page
            api_function.api_visibility = "public" if api_function.api_name == "predict" else "private"
    return page


class ImageInput:
    """Image input that shows an error message if the image cannot be used.

    Only uploaded files and the examples are opened, because a client can send any path or URL.
    """

    def __init__(self, examples: Sequence[str | Path]) -> None:
        self.image = gr.Image(
            label="Image", type="filepath", sources=["upload", "clipboard"], height=360, elem_id="input"
        )
        cache_file = self.image.async_move_resource_to_block_cache

        async def cache_uploaded_file(path_or_url: str | Path | None) -> str | None:
            """Store an uploaded file in gradio's cache. Reject URLs, which gradio would download to the server."""
            if str(path_or_url).startswith(("http:", "https:")):
                raise gr.Error(UPLOAD_REQUIRED_MESSAGE)
            return await cache_file(path_or_url)

        # The method is replaced on the instance, because gradio writes a .pyi file for each subclass of gr.Image.
        self.image.async_move_resource_to_block_cache = cache_uploaded_file  # type: ignore[method-assign,assignment]
        self.error_message = gr.Markdown(visible=False, elem_id="problem")
        self.triggers = [self.image.input]
        self.examples = {os.path.realpath(file) for file in examples}
        if examples:
            example_buttons = gr.Examples([[str(file)] for file in examples], [self.image])
            self.triggers.append(example_buttons.load_input_event.then)

    def predict(self, demo_model: DemoModel, file: dict[str, Any] | None) -> tuple[Any, Any, DemoResult | None]:
        """Run the model on the image in `file`, the unprocessed value of the component `image`. Return updates of
        `image` and `error_message`, and the output of the model (None if there is no valid image).

        The listener sets preprocess=False, because gradio's error messages for files that are not images are unclear.
        """
        no_error = gr.Markdown("", visible=False)
        if file is None:
            return gr.skip(), no_error, None
        image = self.find_uploaded_file(file.get("path"))
        if image is None:
            return None, gr.Markdown(f"**No prediction:** {UPLOAD_REQUIRED_MESSAGE}.", visible=True), None
        try:
            return gr.skip(), no_error, demo_model.predict(image)
        except ValueError as error:
            message = str(error).replace(image, file.get("orig_name") or "the file")
            return None, gr.Markdown(f"**No prediction:** {message}.", visible=True), None

    def find_uploaded_file(self, path: Any) -> str | None:
        """Return the resolved path of an uploaded file or an example image; None for all other files."""
        if not isinstance(path, str) or "\0" in path:
            return None
        file = Path(os.path.realpath(path))
        is_allowed = str(file) in self.examples or file.is_relative_to(os.path.realpath(self.image.GRADIO_CACHE))
        return str(file) if is_allowed and file.is_file() else None


class AttentionView:
    """Attention maps of the selected token, layer and head, with a caption and selection controls."""

    def __init__(self, demo_model: DemoModel, state: gr.State) -> None:
        self.demo_model = demo_model
        token_names = demo_model.token_names
        gr.Markdown("## Attention of the special tokens")
        token_selector = gr.Radio(token_names, value=token_names[0], type="index", label="Token")
        with gr.Row():
            layer_slider = build_layer_slider("Layer", demo_model.config.num_hidden_layers, min_width=240)
            head_names = [MEAN_OF_HEADS, *demo_model.head_names]
            head_selector = gr.Dropdown(head_names, value=MEAN_OF_HEADS, type="index", label="Heads", min_width=240)
        with gr.Row():
            with gr.Column():
                map_image = build_output_image("Attention to the image", "map", ["download", "fullscreen"])
                caption = gr.Markdown(elem_id="shares")
                gr.HTML('<div class="scale"><span>0</span><i></i><span>maximum of the map</span></div>')
            with gr.Column():
                layer_gallery = build_gallery("All layers for this token and head", "layers")
                gr.Markdown("All layers, each with its own scale. Click a map to enlarge it.")
                rollout_gallery = build_gallery("Through all layers", "through")
                gr.Markdown("Through all layers: attention rollout of the token and attribution of the prediction.")
        self.inputs = [state, token_selector, layer_slider, head_selector]
        self.outputs = [map_image, caption, layer_gallery, rollout_gallery]
        for control in (token_selector, head_selector):
            control.input(self.draw_all, self.inputs, self.outputs, show_progress="hidden", **DRAWING_LISTENER_OPTIONS)
        layer_slider.change(
            self.draw_layer, self.inputs, [map_image, caption], show_progress="hidden", **DRAWING_LISTENER_OPTIONS
        )
        layer_gallery.select(get_clicked_layer, None, layer_slider, show_progress="hidden")

    def draw_layer(
        self, result: DemoResult | None, token: int, layer: int, head: int
    ) -> tuple[Image.Image | None, str]:
        """Return the attention map of one layer and a caption. `layer` and `head` are counted from 1; head 0 is the
        mean over heads."""
        if result is None:
            return None, ""
        selection = token, layer - 1, head - 1 if head else None
        fractions = result.compute_attention_fractions(*selection)
        return result.draw_attention(*selection), describe_attention(self.demo_model, *selection, fractions)

    def draw_all(
        self, result: DemoResult | None, token: int, layer: int, head: int
    ) -> tuple[Image.Image | None, str, list[tuple[Image.Image, str]], list[tuple[Image.Image, str]]]:
        """Return the map and caption of `draw_layer`, small maps of all layers, and rollout and attribution maps."""
        if result is None:
            return None, "", [], []
        maps = result.draw_all_layers(token, head - 1 if head else None)
        gallery = [(small_map, f"layer {index}") for index, small_map in enumerate(maps, start=1)]
        return *self.draw_layer(result, token, layer, head), gallery, result.draw_rollout_and_attributions(token)


class PatchView:
    """Patch features after the selected layer: principal components as colors, and similarity to a clicked patch."""

    def __init__(self, demo_model: DemoModel, state: gr.State) -> None:
        gr.Markdown(f"## Patch features\n{PATCHES_TEXT}")
        with gr.Row():
            layer_slider = build_layer_slider("After layer", demo_model.config.num_hidden_layers)
            foreground_checkbox = gr.Checkbox(label="Color only the foreground")
        with gr.Row():
            with gr.Column():
                color_image = build_output_image("Patches as colors", "patches", ["fullscreen"])
            with gr.Column():
                similarity_image = build_output_image("Similarity to a patch", "similarity", ["fullscreen"])
                caption = gr.Markdown(elem_id="similar")
        patch_state = gr.State()
        self.inputs = [state, layer_slider, foreground_checkbox, patch_state]
        self.outputs = [color_image, similarity_image, caption]
        for trigger in (layer_slider.change, foreground_checkbox.input):
            trigger(self.draw_all, self.inputs, self.outputs, show_progress="hidden", **DRAWING_LISTENER_OPTIONS)
        color_image.select(find_clicked_patch, [state, color_image], patch_state, show_progress="hidden").then(
            self.draw_all, self.inputs, self.outputs, show_progress="hidden", **DRAWING_LISTENER_OPTIONS
        )

    def draw_all(
        self, result: DemoResult | None, layer: int, foreground_only: bool, patch: tuple[int, int] | None
    ) -> tuple[Image.Image | None, Image.Image | None, str]:
        """Return an image of the principal components, an image of the similarity to `patch` (default: the middle
        patch), and a caption."""
        if result is None:
            return None, None, ""
        rows, columns = result.patch_features.shape[1:3]
        row, column = patch if patch and patch[0] < rows and patch[1] < columns else (rows // 2, columns // 2)
        return (
            result.draw_principal_components(layer - 1, foreground_only),
            result.draw_similarity(layer - 1, row, column),
            f"Cosine similarity to the patch in row {row + 1}, column {column + 1} (dark: 0 or less, bright: 1).",
        )


def build_layer_slider(label: str, num_layers: int, **options: Any) -> gr.Slider:
    """Build a layer slider, which is hidden if there is only one layer."""
    max_layer = max(num_layers, 2)  # gradio requires a range of at least two values
    return gr.Slider(1, max_layer, value=num_layers, step=1, label=label, visible=num_layers > 1, **options)


def build_output_image(label: str, elem_id: str, buttons: list[Any]) -> gr.Image:
    """Build an image component that users cannot edit."""
    return gr.Image(label=label, show_label=False, interactive=False, buttons=buttons, elem_id=elem_id)


def build_gallery(label: str, elem_id: str) -> gr.Gallery:
    """Build a gallery of small maps. Clicking a map selects the map without opening a preview."""
    options: dict[str, Any] = {"allow_preview": False, "object_fit": "contain", "height": "auto"}
    return gr.Gallery(label=label, show_label=False, buttons=[], elem_id=elem_id, **options)


def find_clicked_patch(result: DemoResult | None, clicked_image: Any, event: gr.SelectData) -> tuple[int, int] | None:
    """Return the row and column of the clicked patch, or None if the click is outside the visible region."""
    if result is None or clicked_image is None:
        return None
    (height, width), (x, y) = clicked_image.shape[:2], event.index
    return result.find_patch(x, y, width, height)


def get_clicked_layer(event: gr.SelectData) -> int:
    """Return the layer of the clicked map, counted from 1."""
    return event.index + 1
