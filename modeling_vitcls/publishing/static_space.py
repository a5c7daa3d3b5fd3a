"""A static Space on the Hub: a page that runs a copy of the model in the browser, with transformers.js.

export_for_transformers_js("someone/model@commit", folder)
files = build_static_space_files(model, folder)       # space.py pushes the files

index.html, app.js   the page, from modeling_vitcls/demo/
model/               the exported model
transformers.js/     transformers.js and onnxruntime, if they are not loaded from a CDN
README.md            the settings of the Space
"""

import html
import json
from pathlib import Path

from .code_files import PACKAGE_FOLDER
from .manifest import RepoFiles
from .space import PublishedModel, build_space_card


MODEL_FOLDER = "model"
LIBRARY_FOLDER = "transformers.js"
TRANSFORMERS_JS_VERSION = "4.3.1"  # tested version of the npm package @huggingface/transformers
TRANSFORMERS_JS_URL = f"https://cdn.jsdelivr.net/npm/@huggingface/transformers@{TRANSFORMERS_JS_VERSION}"
# Files that the page loads, relative to the node_modules folder.
LIBRARY_FILES = (
    "@huggingface/transformers/dist/transformers.min.js",
    "onnxruntime-web/dist/ort-wasm-simd-threaded.asyncify.mjs",
    "onnxruntime-web/dist/ort-wasm-simd-threaded.asyncify.wasm",
)

DESCRIPTION_TEMPLATE = """
Select an image to see the predictions of the Vision Transformer [{model}]({url}) and the attention of its CLS
token.

The model runs in the browser, with transformers.js. Images are not uploaded. The model in `{folder}/` was exported
from commit [`{commit}`]({url}/tree/{commit}).
"""


def build_static_space_files(
    model: PublishedModel, exported_folder: Path, title: str | None = None, node_modules: Path | None = None
) -> RepoFiles:
    """Build the files of a static Space. `exported_folder` is the folder written by `export_for_transformers_js`.

    By default, the page loads transformers.js from a CDN. If `node_modules` is set, the required files of the npm
    package `@huggingface/transformers` are copied from this folder to the Space instead. Raise ValueError if
    `node_modules` lacks a required file.
    """
    title = title or f"{model.repo_id.partition('/')[2]}: labels and attention in the browser"
    files: RepoFiles = {
        f"{MODEL_FOLDER}/{file.relative_to(exported_folder).as_posix()}": file
        for file in sorted(exported_folder.rglob("*"))
        if file.is_file()
    }
    library_url = TRANSFORMERS_JS_URL
    if node_modules is not None:
        library_url = f"./{LIBRARY_FOLDER}/{Path(LIBRARY_FILES[0]).name}"
        for name in LIBRARY_FILES:
            if not (node_modules / name).is_file():
                raise ValueError(
                    f"--node-modules requires {name}, but {node_modules} does not contain this file. Run `npm install "
                    f"@huggingface/transformers@{TRANSFORMERS_JS_VERSION}`"
                )
            files[f"{LIBRARY_FOLDER}/{Path(name).name}"] = node_modules / name
    page_html = (PACKAGE_FOLDER / "demo" / "static.html").read_text(encoding="utf-8")
    page_html = page_html.replace('"LIBRARY"', json.dumps(library_url)).replace("TITLE", html.escape(title))
    return files | {
        "index.html": page_html.encode(),
        "app.js": PACKAGE_FOLDER / "demo" / "static.js",
        "README.md": build_space_card(
            model, title, DESCRIPTION_TEMPLATE, {"sdk": "static"}, folder=MODEL_FOLDER
        ).encode(),
    }
