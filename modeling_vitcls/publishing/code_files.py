"""The code files of a model: digest, reading order, and differences from this package.

compute_code_digest(folder)                    # the same as: cat *_vitcls.py | sha256sum
describe_code_differences(folder)              # "code identical to modeling_vitcls 0.2.0", or the files that differ
"""

import hashlib
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from ..version import __version__


PACKAGE_FOLDER = Path(__file__).parents[1]
CODE_PATTERN = "*_vitcls.py"
# License file of the code. Other license files in a model folder apply to the weights.
CODE_LICENSE_FILE = "CODE_LICENSE"

HANDLER_FILE = "handler.py"  # file name of the handler for Inference Endpoints on the Hub
HANDLER_SOURCE = Path(__file__).with_name("endpoint_handler.py")

# Reading order of the code files; each file imports only from earlier files.
READING_ORDER = tuple(
    f"{name}_vitcls.py"
    for name in (
        "configuration positions attention_masks blocks heads variants token_attention adaptation cpu_kernels "
        "modeling fast_image_processing image_processing"
    ).split()
)


def describe_code_differences(folder: Path) -> str:
    """Compare all Python files of a folder with the code files of this package, and return the result in one line."""
    expected_files = {file.name: file.read_bytes() for file in PACKAGE_FOLDER.glob(CODE_PATTERN)}
    if (folder / HANDLER_FILE).is_file():
        expected_files[HANDLER_FILE] = HANDLER_SOURCE.read_bytes()
    actual_files = {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*.py")}
    names_by_difference = {
        "changed": {name for name, content in actual_files.items() if expected_files.get(name, content) != content},
        "missing": expected_files.keys() - actual_files.keys(),
        "added": actual_files.keys() - expected_files.keys(),
    }
    differences = [
        f"{', '.join(sorted(names))} ({difference})" for difference, names in names_by_difference.items() if names
    ]
    package = f"modeling_vitcls {__version__}"
    return f"code differs from {package}: {'; '.join(differences)}" if differences else f"code identical to {package}"


def compute_code_digest(folder: Path = PACKAGE_FOLDER) -> str:
    """Return the hexadecimal SHA-256 of the code files of a folder, concatenated in alphabetical order."""
    return hashlib.sha256(b"".join(file.read_bytes() for file in sorted(folder.glob(CODE_PATTERN)))).hexdigest()


def read_code_license() -> bytes:
    """Return the text of the license of the code files. Raise ValueError if the license is not installed."""
    checkout_license = PACKAGE_FOLDER.parent / "LICENSE"
    if checkout_license.is_file():
        return checkout_license.read_bytes()
    try:
        text = distribution("modeling_vitcls").read_text("licenses/LICENSE")
    except PackageNotFoundError:
        text = None
    if text is None:
        raise ValueError("the license of modeling_vitcls was not found. Reinstall the package")
    return text.encode()
