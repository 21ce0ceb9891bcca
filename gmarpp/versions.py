"""Versions of what results depend on."""

import platform

import lightning as L
import timm
import torch

import gmarpp


def versions() -> dict[str, str]:
    """Versions of gmarpp, Python and the libraries that train and build networks, by name."""
    return {
        "gmarpp": gmarpp.__version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "lightning": L.__version__,
        "timm": timm.__version__,
    }
