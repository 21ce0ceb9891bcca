import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from gmarpp.run import lock
from gmarpp.run.lock import LOCK_FILE, FolderLock

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such locks")

HOLDER = """
import multiprocessing, os, runpy, sys, time
from pathlib import Path
def run():
    print(os.getpid(), flush=True)
    time.sleep(60)
lock = runpy.run_path(sys.argv[1])["FolderLock"](Path(sys.argv[2]))
multiprocessing.get_context("fork").Process(target=run).start()
time.sleep(60)
"""


def test_a_folder_in_use_names_its_holder(tmp_path):
    held = FolderLock(tmp_path)
    with pytest.raises(
        BlockingIOError, match=rf"in use by process {os.getpid()} on {socket.gethostname()}: wait.*another"
    ):
        FolderLock(tmp_path)
    held.release()
    assert list(tmp_path.iterdir()) == []
    FolderLock(tmp_path).release()


def test_the_lock_of_a_killed_process_is_free_at_once_though_its_children_live(tmp_path):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, lock.__file__, tmp_path], stdout=subprocess.PIPE, text=True
    )
    child = int(holder.stdout.readline())
    try:
        with pytest.raises(BlockingIOError, match=f"process {holder.pid} on"):
            FolderLock(tmp_path)
        holder.kill()
        holder.wait()
        os.kill(child, 0)
        FolderLock(tmp_path).release()
    finally:
        os.kill(child, signal.SIGKILL)
        holder.stdout.close()


def test_a_lock_file_that_is_none_of_ours_neither_blocks_nor_leads_elsewhere(tmp_path):
    other = tmp_path / "other"
    other.write_text("precious")
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / LOCK_FILE).symlink_to(other)
    with pytest.raises(OSError, match=r"run/\.lock"):
        FolderLock(folder)
    assert other.read_text() == "precious"
    Path(folder / LOCK_FILE).unlink()
    os.mkfifo(folder / LOCK_FILE)
    with pytest.raises(OSError, match=r"ordinary file: delete this one.*run/\.lock"):
        FolderLock(folder)


def test_a_file_system_without_locks_warns(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    with pytest.warns(UserWarning, match="cannot be locked: start no second run"):
        FolderLock(tmp_path).release()
    assert list(tmp_path.iterdir()) == []
