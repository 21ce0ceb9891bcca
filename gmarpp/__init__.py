"""Fine-tune Vision Transformers with PyTorch Lightning and explain them with GMAR++.

Nothing is imported before it is used, so that `import gmarpp` and the help of the command line need no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__all__ = [
    "METHODS",
    "METHOD_LABELS",
    "VARIANTS",
    "Architecture",
    "Contrast",
    "Explanation",
    "FunctionMethod",
    "GraphedExplain",
    "MapMethod",
    "Method",
    "UnsupportedNetworkError",
    "architecture_of",
    "explain",
    "load_explanations",
    "load_model",
    "perturbation_curves",
    "register_method",
]

if TYPE_CHECKING:
    from gmarpp import attribution as attribution
    from gmarpp import callbacks as callbacks
    from gmarpp import data as data
    from gmarpp import metrics as metrics
    from gmarpp import perturbation as perturbation
    from gmarpp import targets as targets
    from gmarpp.attribution import (
        METHODS,
        VARIANTS,
        Architecture,
        Contrast,
        Explanation,
        FunctionMethod,
        GraphedExplain,
        MapMethod,
        Method,
        UnsupportedNetworkError,
        architecture_of,
        explain,
        register_method,
    )
    from gmarpp.labels import METHOD_LABELS
    from gmarpp.network.files.load import load_model
    from gmarpp.perturbation import perturbation_curves
    from gmarpp.run.reader import load_explanations

    __version__: str
else:
    # Type checkers do not see `__getattr__`, which would make every misspelled name right.
    _SUBPACKAGES = ("attribution", "callbacks", "data", "metrics", "perturbation", "targets")
    _MODULES = {
        "METHODS": "gmarpp.attribution",
        "METHOD_LABELS": "gmarpp.labels",
        "VARIANTS": "gmarpp.attribution",
        "Architecture": "gmarpp.attribution",
        "Contrast": "gmarpp.attribution",
        "Explanation": "gmarpp.attribution",
        "FunctionMethod": "gmarpp.attribution",
        "GraphedExplain": "gmarpp.attribution",
        "MapMethod": "gmarpp.attribution",
        "Method": "gmarpp.attribution",
        "UnsupportedNetworkError": "gmarpp.attribution",
        "architecture_of": "gmarpp.attribution",
        "explain": "gmarpp.attribution",
        "load_explanations": "gmarpp.run.reader",
        "load_model": "gmarpp.network.files.load",
        "perturbation_curves": "gmarpp.perturbation",
        "register_method": "gmarpp.attribution",
    }

    def __getattr__(name: str) -> Any:
        """Return a public name or a subpackage, which is imported at its first use."""
        if name in _SUBPACKAGES:
            return import_module(f"gmarpp.{name}")
        if name == "__version__":
            from importlib.metadata import version

            value = version("gmarpp")
        elif name in _MODULES:
            value = getattr(import_module(_MODULES[name]), name)
        else:
            raise AttributeError(f"module 'gmarpp' has no attribute {name!r}")
        globals()[name] = value
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__, *_SUBPACKAGES, "__version__"})
