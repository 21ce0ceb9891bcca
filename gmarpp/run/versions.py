"""Versions of what results depend on."""

import platform
from importlib.metadata import version

import lightning as L
import timm
import torch


def versions() -> dict[str, str]:
    """Return the versions of gmarpp, Python and the libraries that train and build networks, by name."""
    return {
        "gmarpp": version("gmarpp"),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "lightning": L.__version__,
        "timm": timm.__version__,
    }
