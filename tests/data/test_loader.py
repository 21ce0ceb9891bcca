from itertools import chain, pairwise

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from miniature import PLAIN
from quiet_trainer import quiet_trainer
from torch.utils.data import Dataset

from gmarpp.data import ImageDataModule
from gmarpp.data.dataset import Record
from gmarpp.data.loader import EpochSampler, ResumableLoader, UnrepeatedSampler, equal_batch_count


def flat(lists):
    return list(chain.from_iterable(lists))


class Keys(Dataset):
    def __init__(self, images):
        self.images = images

    def __len__(self):
        return self.images

    def __getitem__(self, key):
        index, epoch = key
        return 1000 * epoch + index


def loader(images=23, batch_size=4, world_size=1, rank=0, workers=0, epoch=0):
    dataset = Keys(images)
    sampler = EpochSampler(dataset, world_size, rank, seed=3)
    sampler.set_epoch(epoch)
    return ResumableLoader(dataset, batch_size=batch_size, sampler=sampler, drop_last=True, num_workers=workers)


def batches(loader):
    return [batch.tolist() for batch in loader]


def test_ranks_together_see_what_one_process_sees():
    whole = batches(loader(images=24, batch_size=6))
    parts = [batches(loader(images=24, batch_size=2, world_size=3, rank=rank)) for rank in range(3)]
    assert [sorted(batch) for batch in whole] == [sorted(flat(batch)) for batch in zip(*parts, strict=True)]
    assert sorted(flat(whole)) == list(range(24))


def test_epochs_have_different_orders_and_say_so():
    first, second = batches(loader(epoch=0)), batches(loader(epoch=1))
    assert all(value >= 1000 for value in flat(second))
    assert flat(first) != [value - 1000 for value in flat(second)]
    assert batches(loader(epoch=1)) == second


@pytest.mark.parametrize("workers", [0, 2])
def test_interrupted_epoch_continues_after_the_last_batch(workers):
    expected = batches(loader())
    interrupted = loader(workers=workers)
    iterator = iter(interrupted)
    seen = [next(iterator).tolist() for _ in range(2)]
    resumed = loader(workers=workers)
    resumed.load_state_dict(interrupted.state_dict())
    assert len(resumed) == len(expected) == 5
    assert seen + batches(resumed) == expected
    # the next epoch is whole again
    resumed.sampler.set_epoch(1)
    assert batches(resumed) == batches(loader(epoch=1))


def test_interrupted_epoch_continues_on_other_ranks():
    interrupted = loader(images=24, batch_size=4)
    iterator = iter(interrupted)
    seen = [next(iterator).tolist() for _ in range(2)]
    rest = []
    for rank in range(2):
        resumed = loader(images=24, batch_size=2, world_size=2, rank=rank)
        resumed.load_state_dict(interrupted.state_dict())
        rest += batches(resumed)
    assert sorted(flat(seen) + flat(rest)) == list(range(24))


def test_state_of_a_finished_epoch_skips_nothing_of_the_next():
    finished = loader()
    batches(finished)
    resumed = loader(epoch=1)
    resumed.load_state_dict(finished.state_dict())
    assert batches(resumed) == batches(loader(epoch=1))


@pytest.mark.parametrize("images", range(1, 40))
def test_every_image_is_evaluated_once_in_as_many_batches_per_rank(images):
    for world_size in (1, 2, 3):
        if images < world_size:
            continue
        shares = [list(UnrepeatedSampler(range(images), world_size, rank)) for rank in range(world_size)]
        assert sorted(flat(shares)) == list(range(images))
        for batch_size in (1, 2, 3, 8):
            size = equal_batch_count(images, world_size, batch_size)
            counts = {-(-len(share) // size) for share in shares}
            assert len(counts) == 1, (images, world_size, batch_size)
            assert batch_size < 8 or size in (7, 8)


class Points:
    def read(self, row):
        return Record(torch.full((3, 16, 16), row, dtype=torch.uint8), str(row))


class PointData(ImageDataModule):
    def read_classes(self):
        return ("a", "b"), ("a", "b")

    def read_split(self, split):
        return Points(), np.arange(23 if split == "train" else 4) % 2


class Recorder(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen = []

    def training_step(self, batch, batch_idx):
        drawn = torch.rand(()).item()
        self.seen.append(
            (
                self.trainer.global_step,
                self.trainer.current_epoch,
                batch["index"].tolist(),
                batch["image"].sum().item(),
                drawn,
            )
        )
        return self.weight * batch["image"].mean()

    def validation_step(self, batch, batch_idx):
        self.log("index", batch["index"].float().mean())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(folder, resume=None, workers=0, **checkpoint):
    torch.manual_seed(11)
    module = Recorder()
    trainer = quiet_trainer(
        folder,
        max_epochs=3,
        num_sanity_val_steps=0,
        val_check_interval=checkpoint.pop("val_check_interval", 1.0),
        overfit_batches=checkpoint.pop("overfit_batches", 0),
        callbacks=[ModelCheckpoint(folder, filename="{step}", save_top_k=-1, **checkpoint)],
    )
    data = PointData(batch_size=4, num_workers=workers, preprocessing=PLAIN, seed=3)
    trainer.fit(module, data, ckpt_path=resume)
    return module.seen


@pytest.mark.parametrize(
    ("when", "steps"),
    [
        ({"every_n_train_steps": 1}, range(1, 15)),
        ({"every_n_epochs": 1, "save_on_train_epoch_end": True}, (5, 10)),
        ({"every_n_epochs": 1, "save_on_train_epoch_end": False}, (5, 10)),
        ({"monitor": "index", "save_on_train_epoch_end": False, "val_check_interval": 2}, (2, 4, 7, 9, 12, 14)),
    ],
)
@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_resumed_run_sees_what_an_uninterrupted_one_would(tmp_path, when, steps):
    expected = fit(tmp_path / "whole", **when)
    assert [step for step, *_ in expected] == list(range(15))
    assert all(a[2] != b[2] for a, b in pairwise(expected))
    for step in steps:
        resumed = fit(tmp_path / f"resumed-{step}", resume=tmp_path / "whole" / f"step={step}.ckpt", **when)
        assert [seen[:4] for seen in resumed] == [seen[:4] for seen in expected[step:]], step


@pytest.mark.parametrize("hook", ["on_before_batch_transfer", "on_train_batch_start", "on_before_optimizer_step"])
def test_run_resumed_after_an_error_repeats_the_interrupted_batch(tmp_path, monkeypatch, hook):
    def interrupt(module, *arguments):
        if module.trainer.training and module.trainer.global_step == 7:
            raise KeyError("interrupted")
        return arguments[0]

    expected = fit(tmp_path / "whole", every_n_train_steps=100)
    with monkeypatch.context() as patch:
        patch.setattr(Recorder, hook, interrupt)
        with pytest.raises(KeyError, match="interrupted"):
            fit(tmp_path / "broken", every_n_train_steps=100, save_on_exception=True)
    resumed = fit(tmp_path / "resumed", resume=tmp_path / "broken" / "step=7.ckpt", every_n_train_steps=100)
    assert [seen[:4] for seen in resumed] == [seen[:4] for seen in expected[7:]]


def test_overfitting_repeats_the_same_batches(tmp_path):
    seen = fit(tmp_path, overfit_batches=2, every_n_train_steps=1)
    assert [indices for _, _, indices, *_ in seen] == 3 * [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_loading_leaves_the_global_generator_alone(tmp_path):
    drawn = [seen[4] for seen in fit(tmp_path / "workers", workers=1)]
    torch.manual_seed(11)
    assert drawn == [torch.rand(()).item() for _ in drawn]
