"""Fine-tune Vision Transformers with PyTorch Lightning and explain them with GMAR++."""

from gmarpp.attribution import (
    METHODS,
    VARIANTS,
    Architecture,
    Contrast,
    Explanation,
    UnsupportedNetworkError,
    architecture_of,
    explain,
)
from gmarpp.labels import METHOD_LABELS
from gmarpp.network.load import load_model
from gmarpp.perturbation import perturbation_curves
from gmarpp.run.reader import load_explanations

__version__ = "0.1.0"
__all__ = [
    "METHODS",
    "METHOD_LABELS",
    "VARIANTS",
    "Architecture",
    "Contrast",
    "Explanation",
    "UnsupportedNetworkError",
    "architecture_of",
    "explain",
    "load_explanations",
    "load_model",
    "perturbation_curves",
]
