"""Let writing fail, as on a full disk."""

import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch


@contextmanager
def limited_file_size(num_bytes: int) -> Iterator[None]:
    """Let writing fail when a file becomes larger.

    Compiled modules are not written, as Python would leave truncated files.
    """
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, limits[1]))
    try:
        with patch.object(sys, "dont_write_bytecode", True):
            yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
