"""The memory of tensors on CPUs: kept for the next ones when they are freed, and taken in large pages.

By itself the C library gives large blocks back to the system, which clears every page of the next one: about 20,000
pages in a forward pass of ViT-S/16 on 8 images, and two to six times as many in a training step of 16.
"""

import ctypes
import os
import platform


# Of mallopt in glibc's <malloc.h>.
M_TRIM_THRESHOLD = -1  # bytes free at the end of the heap from which on they are given back; -1 for never
M_MMAP_MAX = -4  # blocks that are taken from the system one by one; 0 for none


def keep_memory() -> None:
    """Let this process keep what its tensors free, and PyTorch ask for large pages if it has no tensors yet.

    What the user has set by variables of the environment stays, and so does another C library as it is.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    is_set = any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ)
    if platform.libc_ver()[0] == "glibc" and not is_set:
        library = ctypes.CDLL(None)
        library.mallopt(M_MMAP_MAX, 0)
        library.mallopt(M_TRIM_THRESHOLD, -1)
