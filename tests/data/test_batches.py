import os
import signal
import subprocess
import time

import pytest
import torch
from torch.utils.data import DataLoader

from gmarpp.data.batches import batch_loader, pending_batches


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


class Processes:
    """Items that name the process that loads them."""

    def __len__(self):
        return 8

    def __getitem__(self, index):
        return os.getpid()


@pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="the system does not tell who sent a signal")
def test_a_signal_to_the_whole_group_does_not_end_loading():
    loader = DataLoader(Processes(), batch_size=1, num_workers=1)
    batches = iter(batch_loader(loader, [[number] for number in range(8)]))
    worker = next(batches).item()
    assert worker != os.getpid()
    subprocess.run(["kill", "-TERM", str(worker)], check=True)
    time.sleep(0.2)
    assert [batch.item() for batch in batches] == [worker] * 7
