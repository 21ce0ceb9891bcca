"""Lightning callbacks that explain a network and keep what comes out."""

from gmarpp.callbacks.monitor import AttributionMonitor
from gmarpp.callbacks.writer import ExplanationWriter

__all__ = ["AttributionMonitor", "ExplanationWriter"]
