"""What the C library does with memory that tensors on the CPU have given back."""

import ctypes

# malloc.h of the GNU C library
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_LARGEST_MMAP_THRESHOLD = 32 * 2**20  # the library takes no more


def keep_freed_memory() -> None:
    """Let the process keep memory that it frees, for the next tensors; other C libraries are left alone.

    By default the GNU C library gives large blocks back at once, and every step of a training has to get the
    same pages from the system again. The most that is in use at a time stays the same.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD)
        mallopt(_TRIM_THRESHOLD, 2**31 - 1)
