"""Data modules for training and explaining, and what turns pictures into tensors."""

from gmarpp.data.decode import read_image, read_mask
from gmarpp.data.digits import Digits
from gmarpp.data.hub import HubDataset
from gmarpp.data.image_folder import ImageFolder
from gmarpp.data.module import ImageDataModule
from gmarpp.data.table import Table
from gmarpp.data.tiny_imagenet import TinyImageNet
from gmarpp.data.transforms import Augmentation, EvaluationTransform, TrainingTransform
from gmarpp.network.preprocessing import Preprocessing, denormalize

__all__ = [
    "Augmentation",
    "Digits",
    "EvaluationTransform",
    "HubDataset",
    "ImageDataModule",
    "ImageFolder",
    "Preprocessing",
    "Table",
    "TinyImageNet",
    "TrainingTransform",
    "denormalize",
    "read_image",
    "read_mask",
]
