"""Memory that has been freed, but that the C library keeps."""

import ctypes
import sys


def return_free_memory() -> None:
    """Give free pages of the heap back to the system, where the C library is glibc; elsewhere do nothing.

    By itself glibc returns only what lies above the last live block. Small tensors that wait to be written lie among
    the large ones of every batch, so that a run's resident set would grow with its length.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
