"""The code files of a model: their digest, the order in which to read them, and their differences from this package.

compute_code_digest(folder)                    # the same as: cat *_vitcls.py | sha256sum
describe_code_differences(folder)              # "code identical to modeling_vitcls 0.2.0", or which files differ
"""

import hashlib
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from ..version import __version__


PACKAGE = Path(__file__).parents[1]
CODE_PATTERN = "*_vitcls.py"
# The license of the code files, next to them. It has another name than the license of the weights.
CODE_LICENSE_FILE = "CODE_LICENSE"

HANDLER_FILE = "handler.py"  # name on the Hub of the handler for Inference Endpoints
HANDLER = Path(__file__).with_name("endpoint_handler.py")

# Each file uses only names of earlier files.
READING_ORDER = tuple(
    f"{name}_vitcls.py"
    for name in (
        "configuration positions attention_masks blocks heads variants token_attention adaptation cpu_kernels "
        "modeling fast_image_processing image_processing"
    ).split()
)


def describe_code_differences(folder: Path) -> str:
    """Return one line that compares all Python files of a folder with the code files of this package, by name."""
    own = {file.name: file.read_bytes() for file in PACKAGE.glob(CODE_PATTERN)}
    if (folder / HANDLER_FILE).is_file():
        own[HANDLER_FILE] = HANDLER.read_bytes()
    others = {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*.py")}
    groups = {
        "changed": {name for name in own.keys() & others.keys() if own[name] != others[name]},
        "missing": own.keys() - others.keys(),
        "added": others.keys() - own.keys(),
    }
    differences = [f"{', '.join(sorted(names))} ({group})" for group, names in groups.items() if names]
    package = f"modeling_vitcls {__version__}"
    return f"code differs from {package}: {'; '.join(differences)}" if differences else f"code identical to {package}"


def compute_code_digest(folder: Path = PACKAGE) -> str:
    """Return the SHA-256 of the code files of a folder, concatenated in alphabetical order, in hexadecimal digits."""
    return hashlib.sha256(b"".join(file.read_bytes() for file in sorted(folder.glob(CODE_PATTERN)))).hexdigest()


def read_code_license() -> bytes:
    """Return the text of the license of the code files. Raises ValueError if it is not installed."""
    checkout = PACKAGE.parent / "LICENSE"
    if checkout.is_file():
        return checkout.read_bytes()
    try:
        text = distribution("modeling_vitcls").read_text("licenses/LICENSE")
    except PackageNotFoundError:
        text = None
    if text is None:
        raise ValueError("the license of modeling_vitcls was not found. Install the package again")
    return text.encode()
