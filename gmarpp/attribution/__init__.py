"""Attribution maps of Vision Transformers from intercepted attention; independent of Lightning."""

from gmarpp.attribution.call import UnsupportedNetworkError
from gmarpp.attribution.explain import explain
from gmarpp.attribution.explanation import Explanation
from gmarpp.attribution.grid import Architecture, architecture_of
from gmarpp.attribution.method import Method
from gmarpp.attribution.methods import (
    GMAR,
    METHOD_LABELS,
    METHODS,
    VARIANTS,
    Chefer,
    GMARPlusPlus,
    LastAttention,
    LeGrad,
    RandomMap,
    Rollout,
    resolve_method,
)
from gmarpp.attribution.target import Contrast

__all__ = [
    "GMAR",
    "METHODS",
    "METHOD_LABELS",
    "VARIANTS",
    "Architecture",
    "Chefer",
    "Contrast",
    "Explanation",
    "GMARPlusPlus",
    "LastAttention",
    "LeGrad",
    "Method",
    "RandomMap",
    "Rollout",
    "UnsupportedNetworkError",
    "architecture_of",
    "explain",
    "resolve_method",
]
