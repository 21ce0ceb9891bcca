"""How often a file is opened, by whatever code: Python's, PyTorch's in C++, or that of safetensors in Rust."""

import ctypes
import os
import select
import struct
from contextlib import contextmanager

import pytest

_ACCESS, _CLOSE, _OPEN = 0x1, 0x10, 0x20


@contextmanager
def opens_of(path):
    """Yield a list that holds, after the block, one entry per time that the file was opened in it; Linux only.

    The system joins equal events that follow each other, so reading and closing are watched, too: they come between.
    """
    library = ctypes.CDLL(None, use_errno=True)
    if not hasattr(library, "inotify_init1"):
        pytest.skip("only Linux says how often a file is opened")
    handle, opens = library.inotify_init1(os.O_NONBLOCK), []
    try:
        assert library.inotify_add_watch(handle, os.fsencode(path), _ACCESS | _CLOSE | _OPEN) >= 0
        yield opens
        events = os.read(handle, 1 << 20) if select.select([handle], [], [], 0)[0] else b""
        while events:
            _, mask, _, length = struct.unpack_from("iIII", events)
            opens += ["open"] * bool(mask & _OPEN)
            events = events[16 + length :]
    finally:
        os.close(handle)
