import os
import shutil
import tempfile

import pytest
import torch
from full_disk import no_file_larger_than

from gmarpp.files import atomic_file
from gmarpp.training.checkpoint_io import AtomicCheckpointIO


def test_full_disk_leaves_the_old_checkpoint(tmp_path):
    path = tmp_path / "new" / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"weights": torch.ones(3)}, path)
    with no_file_larger_than(1000), pytest.raises(OSError, match=r"cannot write: File too large: .*last\.ckpt"):
        AtomicCheckpointIO().save_checkpoint({"weights": torch.zeros(1000)}, path)
    assert torch.equal(AtomicCheckpointIO().load_checkpoint(path)["weights"], torch.ones(3))
    assert list(path.parent.iterdir()) == [path]


def test_the_file_is_made_where_it_belongs(tmp_path, monkeypatch):
    """A temporary folder on another file system would make copying of moving."""
    monkeypatch.setattr(tempfile, "tempdir", "/nowhere")
    monkeypatch.setattr(shutil, "move", None)
    AtomicCheckpointIO().save_checkpoint({"step": 7}, str(tmp_path / "last.ckpt"))
    assert torch.load(tmp_path / "last.ckpt", weights_only=True) == {"step": 7}
    assert (tmp_path / "last.ckpt").stat().st_mode & 0o777 == 0o666 & ~_umask()


def test_the_next_run_removes_what_killed_ones_left(tmp_path):
    old, new = (tmp_path / "logs" / f"version_{index}" / "checkpoints" for index in range(2))
    old.mkdir(parents=True)
    (old / ".0123abcd.tmp").write_bytes(b"half")
    (old / ".notours!.tmp").touch()
    (old / "last.ckpt").touch()
    with atomic_file(old / "best.ckpt") as live:
        live.write(b"of a process that is at it")
        AtomicCheckpointIO().save_checkpoint({"weights": torch.ones(3)}, new / "last.ckpt")
        assert len(list(old.glob(".*.tmp"))) == 2
    assert sorted(file.name for file in old.iterdir()) == [".notours!.tmp", "best.ckpt", "last.ckpt"]
    assert sorted(file.name for file in new.iterdir()) == ["last.ckpt"]


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_remote_addresses_are_left_to_lightning():
    content = {"pytorch-lightning_version": "2.6.6", "state_dict": {}, "step": 7}
    AtomicCheckpointIO().save_checkpoint(content, "memory://run/last.ckpt")
    assert AtomicCheckpointIO().load_checkpoint("memory://run/last.ckpt") == content
