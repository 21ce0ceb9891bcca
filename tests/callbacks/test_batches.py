import torch
from torch.utils.data import DataLoader

from gmarpp.callbacks.batches import batch_loader, pending_batches


def test_all_batches_of_a_new_run():
    assert pending_batches(5, 2, set()) == [[0, 1], [2, 3], [4]]


def test_finished_images_are_left_out_and_the_rest_stays_together():
    assert pending_batches(10, 4, {0, 1, 2, 3, 5}) == [[4, 6, 7], [8, 9]]
    assert pending_batches(4, 4, {0, 1, 2, 3}, ranks=2) == []


def test_every_rank_has_a_batch():
    assert pending_batches(10, 4, set(range(8)), ranks=3) == [[8, 9]] * 3
    assert len(pending_batches(10, 4, set(), ranks=2)) == 3


def test_batches_are_collated_as_the_loader_does():
    images = [{"image": torch.full((1,), float(number)), "path": str(number)} for number in range(6)]
    loader = DataLoader(images, batch_size=4)
    (first, second) = batch_loader(loader, [[3, 1], [5]])
    assert first["image"].tolist() == [[3.0], [1.0]]
    assert first["path"] == ["3", "1"]
    assert second["path"] == ["5"]
