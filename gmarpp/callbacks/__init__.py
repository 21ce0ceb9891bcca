"""Lightning callbacks that explain a network, describe it, average its weights, find its rate or batch, and stop it."""

from gmarpp.callbacks.averaging import AveragedWeights
from gmarpp.callbacks.batch_size import LargestBatchFinder
from gmarpp.callbacks.learning_rate import PeakLearningRateFinder
from gmarpp.callbacks.model_card import ModelCardCheckpoint
from gmarpp.callbacks.monitor import AttributionMonitor
from gmarpp.callbacks.progress import ProgressLines
from gmarpp.callbacks.termination import Termination
from gmarpp.callbacks.writer import ExplanationWriter

__all__ = [
    "AttributionMonitor",
    "AveragedWeights",
    "ExplanationWriter",
    "LargestBatchFinder",
    "ModelCardCheckpoint",
    "PeakLearningRateFinder",
    "ProgressLines",
    "Termination",
]
