"""The files of a model folder that a push publishes, collected in a temporary folder.

    with stage_folder(ModelFolder(Path("runs/mine")), "me/mine") as staged:
        api.upload_folder(folder_path=staged, delete_patterns=DELETE_PATTERNS, ...)

Large files are links. README.md contains the id of the repository, config.resolved.yaml no local paths, and
CODE_LICENSE the license of the code. There are no pickle files, no results of other weights, and no images of a
dataset that may not be published.
"""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import distribution
from pathlib import Path

import yaml

from ..hub.model_files import (
    CARD_FILE,
    CONFIG_FILES,
    EXPORT_PATTERNS,
    IMAGES_FOLDER,
    LICENSE_PATTERNS,
    MODEL_PATTERNS,
    ONNX_PATTERNS,
    PARITY_REPORT_FILE,
    RECIPE_FILE,
    RESULT_IMAGE_PATTERNS,
    RESULTS_FILE,
    RUN_PATTERNS,
    is_match,
)
from .card import has_edited_card, render_card
from .model_folder import ModelFolder


PACKAGE_FOLDER = Path(__file__).parents[1]
# License file of the code. Other license files in a model folder apply to the weights.
CODE_LICENSE_FILE = "CODE_LICENSE"
IMAGE_PATTERNS = tuple(f"{IMAGES_FOLDER}/*.{extension}" for extension in ("png", "jpg", "jpeg", "svg", "webp"))
# A push removes these files from the repository unless the folder contains them: an old model.safetensors would be
# loaded instead of new shards, and old results describe other weights.
DELETE_PATTERNS = [
    *(*MODEL_PATTERNS, *RUN_PATTERNS, *RESULT_IMAGE_PATTERNS, *ONNX_PATTERNS, *EXPORT_PATTERNS, PARITY_REPORT_FILE),
    *("handler.py", "checkpoints/step-*"),
]


@contextmanager
def stage_folder(folder: ModelFolder, repo_id: str) -> Iterator[Path]:
    """Yield a temporary folder with the files to publish. Raise ValueError if the model is incomplete."""
    folder.check_is_complete()
    path, files = folder.path, list_published_files(folder)
    with tempfile.TemporaryDirectory(prefix="vitcls-push-") as temporary_path:
        staged = Path(temporary_path)
        for name in files:
            (staged / name).parent.mkdir(parents=True, exist_ok=True)
            try:
                (staged / name).symlink_to((path / name).resolve())
            except OSError:  # Windows without developer mode
                shutil.copyfile(path / name, staged / name)
        if not has_edited_card(folder):
            replace_file(staged / CARD_FILE, render_card(folder, repo_id, folder.private_files))
        if RECIPE_FILE in files:
            replace_file(staged / RECIPE_FILE, yaml.safe_dump(folder.shareable_flags, sort_keys=False))
        if any(staged.glob("*.py")):
            replace_file(staged / CODE_LICENSE_FILE, read_code_license())
        yield staged


def list_published_files(folder: ModelFolder) -> set[str]:
    """Return the names of the files to publish."""
    names = {path.relative_to(folder.path).as_posix() for path in folder.path.rglob("*") if path.is_file()}
    exported_names = {name for file, report in folder.exports.items() for name in (f"{file}.json", *report["sha256"])}
    if not folder.has_weights:
        exported_names |= {name for name in names if is_match(name, (*CONFIG_FILES, RESULTS_FILE, *LICENSE_PATTERNS))}
        return names & (exported_names | {CARD_FILE})
    patterns = [*MODEL_PATTERNS, *LICENSE_PATTERNS, *IMAGE_PATTERNS, CARD_FILE]
    patterns += [PARITY_REPORT_FILE] if folder.parity_report else []
    patterns += ONNX_PATTERNS if folder.onnx_report else []
    patterns += RUN_PATTERNS if folder.results or not (folder.path / RESULTS_FILE).is_file() else []
    hidden_files = folder.private_files
    if not folder.results:
        hidden_files |= {name for name in names if is_match(name, RESULT_IMAGE_PATTERNS)}
    return ({name for name in names if is_match(name, patterns)} | names & exported_names) - hidden_files


def replace_file(file: Path, text: str) -> None:
    """Write a file in place of a link."""
    file.unlink(missing_ok=True)
    file.write_text(text, encoding="utf-8", newline="\n")


def read_code_license() -> str:
    """Return the text of the license of the code files."""
    checkout_license = PACKAGE_FOLDER.parent / "LICENSE"
    if checkout_license.is_file():
        return checkout_license.read_text(encoding="utf-8")
    return str(distribution("modeling_vitcls").read_text("licenses/LICENSE"))
