"""A disk that is full as soon as a file reaches some size."""

import resource
from contextlib import contextmanager


@contextmanager
def no_file_larger_than(size):
    """Has this process's writes beyond `size` bytes of a file fail, as they do on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
