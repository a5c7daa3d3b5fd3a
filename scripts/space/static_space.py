"""A static Space on the Hub: a page that runs the model in the browser.

transformers.js runs a copy of the model.

export_for_transformers_js("someone/model@commit", folder / MODEL_FOLDER)
write_static_space(folder, model)       # space.py pushes the folder

index.html, app.js   the page, from static.html and static.js
model/               the exported model
README.md            the settings of the Space
"""

import html
import json
import shutil
from pathlib import Path

from huggingface_hub import ModelInfo

from .space import build_space_card


MODEL_FOLDER = "model"
TRANSFORMERS_JS_VERSION = "4.3.1"  # tested version of the npm package @huggingface/transformers
TRANSFORMERS_JS_URL = (
    f"https://cdn.jsdelivr.net/npm/@huggingface/transformers@{TRANSFORMERS_JS_VERSION}"
)

DESCRIPTION_TEMPLATE = """
Select an image to see the predictions of the Vision Transformer [{model}]({url}) and the attention
of its CLS token.

The model runs in the browser, with transformers.js. Images are not uploaded. The model in
`{folder}/` was exported from commit [`{commit}`]({url}/tree/{commit}).
"""


def write_static_space(folder: Path, model: ModelInfo) -> None:
    """Write the files of a static Space to the folder with the exported model in `MODEL_FOLDER`.

    The page loads transformers.js from a CDN.
    """
    page_html = Path(__file__).with_name("static.html").read_text(encoding="utf-8")
    page_html = page_html.replace('"LIBRARY"', json.dumps(TRANSFORMERS_JS_URL)).replace(
        "TITLE", html.escape(model.id)
    )
    (folder / "index.html").write_text(page_html, encoding="utf-8")
    shutil.copyfile(Path(__file__).with_name("static.js"), folder / "app.js")
    card = build_space_card(model, DESCRIPTION_TEMPLATE, {"sdk": "static"}, folder=MODEL_FOLDER)
    (folder / "README.md").write_text(card, encoding="utf-8")
