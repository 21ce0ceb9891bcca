from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import ConcatDataset, DataLoader, IterableDataset, Subset, TensorDataset
from torchvision import transforms
from torchvision.transforms import v2

from gmarpp.data.probe import (
    choose_probe,
    first_source,
    is_indexed,
    labels_of,
    normalization_in,
    spread_over_classes,
)


def test_probe_is_spread_over_classes():
    labels = np.array([3, 3, 3, 1, 1, 0, 7, 7, 7, 7])
    assert spread_over_classes(labels, 4).tolist() == [5, 3, 0, 6]
    assert spread_over_classes(labels, 6).tolist() == [5, 3, 0, 6, 4, 1]
    assert spread_over_classes(labels, 2).tolist() == [5, 0]
    assert sorted(spread_over_classes(labels, 99).tolist()) == list(range(10))


class Labeled:
    def __init__(self, **labels):
        vars(self).update(labels)

    def __len__(self):
        return 4


@pytest.mark.parametrize(
    "labels",
    [
        {"labels": [2, 0, 1, 1]},
        {"targets": torch.tensor([2, 0, 1, 1])},
        {"targets": np.array([2, 0, 1, 1], np.uint8)},
        {"labels": ["cat", "dog", "owl", "owl"], "targets": (2, 0, 1, 1)},
        {"labels": [1, 2, 3], "targets": [2, 0, 1, 1]},  # of something else: there are four samples
    ],
)
def test_classes_are_what_a_data_set_calls_labels_or_targets(labels):
    dataset = Labeled(**labels)
    assert labels_of(dataset).tolist() == [2, 0, 1, 1]
    assert labels_of(Subset(Subset(dataset, [3, 1, 0]), [2, 0])).tolist() == [2, 1]
    assert labels_of(ConcatDataset([dataset, Subset(dataset, [1])])).tolist() == [2, 0, 1, 1, 0]


@pytest.mark.parametrize(
    "labels", [{}, {"targets": [{"boxes": []}] * 4}, {"labels": torch.eye(4)}, {"targets": [[1], [1, 2], [3], [4]]}]
)
def test_without_classes_the_probe_is_spread_over_the_data(labels):
    dataset = Labeled(**labels)
    assert labels_of(dataset) is None
    assert labels_of(ConcatDataset([Labeled(labels=[0, 1, 2, 3]), dataset])) is None
    assert choose_probe(dataset, 2).tolist() == [0, 2]
    assert choose_probe(dataset, 9).tolist() == [0, 1, 2, 3]


def test_the_probe_has_an_image_of_every_class():
    dataset = Subset(Labeled(targets=[0, 0, 0, 1]), [3, 2, 1, 0])
    assert choose_probe(dataset, 2).tolist() == [1, 0]


class Stream(IterableDataset):
    def __iter__(self):
        yield torch.zeros(3)


def test_single_samples_can_be_read_of_indexed_data_alone():
    samples = TensorDataset(torch.zeros(4, 3))
    assert is_indexed(DataLoader(samples, batch_size=2))
    assert not is_indexed(DataLoader(samples, batch_size=None))
    assert not is_indexed(DataLoader(Stream(), batch_size=2))
    assert not is_indexed([torch.zeros(4, 3)])


MEAN, STD = [0.5, 0.4, 0.3], [0.2, 0.25, 0.3]


@pytest.mark.parametrize("library", [transforms, v2])
def test_normalization_is_found_in_the_transform_of_a_data_set(library):
    normalize = library.Normalize(MEAN, STD)
    resize = library.Resize(8)
    composed = library.Compose([resize, library.Compose([normalize])])
    dataset = SimpleNamespace(transform=composed)
    for holder in (normalize, composed, dataset, nn.Sequential(resize, normalize), SimpleNamespace(transforms=dataset)):
        assert normalization_in(holder) == (MEAN, STD)
    assert normalization_in(first_source(Subset(ConcatDataset([Subset([dataset], [0])]), [0]))[0]) == (MEAN, STD)
    for holder in (None, resize, library.Compose([resize]), library.Normalize([123.7] * 3, [58.4] * 3)):
        assert normalization_in(holder) is None
