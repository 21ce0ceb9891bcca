import errno
import io
import multiprocessing
import os
import stat
import sys
import time

import pytest
import torch
from full_disk import no_file_larger_than
from stored_run import run_description, shard

from gmarpp.files import atomic_file, remove_leftovers, sha256, write_atomically
from gmarpp.run.folder import MAPS, PARTS, file_stem, read_run, write_run
from gmarpp.run.shards import finished_indices, merge_parts, read_shard, remove_parts, reopen_maps, shard_files


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "x"
    with atomic_file(path) as file:
        file.write(b"abc")
        assert not path.exists()
    assert path.read_bytes() == b"abc"

    def fail():
        with atomic_file(path) as file:
            file.write(b"other")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert path.read_bytes() == b"abc"
    assert names_in(tmp_path) == ["x"]


def test_a_file_gets_the_permissions_of_any_other(tmp_path):
    write_atomically(tmp_path / "atomic", b"")
    (tmp_path / "plain").touch()
    assert (tmp_path / "atomic").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_full_disk_names_the_file_and_leaves_nothing(tmp_path, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"cannot write: No space left.*table\.csv") as error:
        write_atomically(tmp_path / "table.csv", b"abc")
    assert error.value.errno == errno.ENOSPC
    assert names_in(tmp_path) == []


def test_a_write_that_fails_in_the_block_names_the_file(tmp_path):
    with no_file_larger_than(1000), pytest.raises(OSError, match=r"cannot write: File too large: .*table\.csv"):
        write_atomically(tmp_path / "table.csv", bytes(100_000))
    assert names_in(tmp_path) == []


def test_an_error_of_reading_in_the_block_is_not_one_of_writing(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"gone\.jpg") as error, atomic_file(tmp_path / "table.csv"):
        (tmp_path / "gone.jpg").read_bytes()
    assert "write" not in str(error.value)
    assert names_in(tmp_path) == []


def test_a_durable_file_has_its_content_and_then_its_name_on_the_disk(tmp_path, monkeypatch):
    path, synchronized = tmp_path / "x", []
    monkeypatch.setattr(os, "fsync", lambda handle: synchronized.append((os.fstat(handle).st_ino, path.exists())))
    write_atomically(path, b"abc")
    assert synchronized == [(path.stat().st_ino, False), (tmp_path.stat().st_ino, True)]
    write_atomically(path, b"abc", durable=False)
    assert len(synchronized) == 2


@pytest.mark.parametrize("code", [errno.EINVAL, errno.EIO])
def test_a_file_system_may_have_no_folders_to_synchronize(tmp_path, monkeypatch, code):
    def refuse_folders(handle):
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(code, "no")

    monkeypatch.setattr(os, "fsync", refuse_folders)
    if code == errno.EINVAL:
        write_atomically(tmp_path / "x", b"abc")
        assert names_in(tmp_path) == ["x"]
    else:
        with pytest.raises(OSError, match=r"cannot write: no: .*x"):
            write_atomically(tmp_path / "x", b"abc")


def test_leftovers_of_killed_processes_go_and_nothing_else(tmp_path):
    (tmp_path / "maps").mkdir()
    for name in (".abc_d123.tmp", ".mine.tmp", "x.tmp", "maps/.abcdefgh.tmp", "maps/.keep"):
        (tmp_path / name).touch()
    remove_leftovers(tmp_path)
    assert names_in(tmp_path) == [".mine.tmp", "maps", "x.tmp"]
    assert names_in(tmp_path / "maps") == [".keep"]


def write_slowly(path, written):
    with atomic_file(path) as file:
        file.write(b"half")
        file.flush()
        written.set()
        time.sleep(60)


@pytest.mark.skipif(sys.platform == "win32", reason="open files cannot be deleted there, and nothing is forked")
def test_leftovers_of_living_processes_stay(tmp_path):
    """Another process writes; when it is killed, what it wrote is a leftover."""
    context = multiprocessing.get_context("fork")
    written = context.Event()
    writer = context.Process(target=write_slowly, args=(tmp_path / "last.ckpt", written))
    writer.start()
    assert written.wait()
    remove_leftovers(tmp_path)
    (half,) = tmp_path.iterdir()
    assert half.read_bytes() == b"half"
    writer.kill()
    writer.join()
    remove_leftovers(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_missing_folder_names_the_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="there"):
        write_atomically(tmp_path / "not" / "there", b"")


@pytest.mark.parametrize(
    ("path", "stem"),
    [
        ("a/cat.jpg", "000003-cat"),
        ("b/cat.png", "000003-cat"),
        ("x/../../etc/passwd", "000003-passwd"),
        ("C:\\photos\\dog.bmp", "000003-dog"),
        ("q\"uo'te <b>.jpg", "000003-q-uo-te-b"),
        ("猫.jpg", "000003"),
        ("x" * 300 + ".jpg", "000003-" + "x" * 60),
        ("bad\udcff.jpg", "000003-bad"),
        (".hidden", "000003-hidden"),
    ],
)
def test_file_stem_is_safe_and_short(path, stem):
    assert file_stem(3, path) == stem


def test_shards_are_read_back_as_they_were_and_equal_shards_are_equal_bytes(tmp_path):
    original = shard([4, 2], ["a <b>", "ü\udcff"])
    original.write(tmp_path / "one.safetensors")
    original.write(tmp_path / "two.safetensors")
    assert (tmp_path / "one.safetensors").read_bytes() == (tmp_path / "two.safetensors").read_bytes()
    read = read_shard(tmp_path / "one.safetensors")
    assert read.rows == original.rows
    assert (read.methods, read.metrics) == (original.methods, original.metrics)
    assert set(read.tensors) == set(original.tensors)
    for key, tensor in original.tensors.items():
        assert torch.equal(read.tensors[key].nan_to_num(-1), tensor.nan_to_num(-1))
    assert torch.equal(read.fractions, original.fractions)


def test_a_damaged_shard_is_named_with_the_remedy(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"nonsense")
    with pytest.raises(ValueError, match=r"x\.safetensors is damaged.*delete it"):
        read_shard(path)


def parts_folder(folder, parts):
    (folder / PARTS).mkdir(parents=True)
    (folder / MAPS).mkdir()
    write_run(folder, run_description())
    for number, indices in enumerate(parts):
        shard(indices, [f"{index}.jpg" for index in indices]).write(folder / PARTS / f"{number}.safetensors")
    return folder


def test_merged_shards_do_not_depend_on_the_parts(tmp_path):
    one = parts_folder(tmp_path / "one", [range(11)])
    many = parts_folder(tmp_path / "many", [[9, 1, 3], [0, 2, 4, 6], [10, 8], [7, 5], [4, 6]])
    assert merge_parts(one, 4) == merge_parts(many, 4) == 11
    names = ["00000.safetensors", "00001.safetensors", "00002.safetensors", "index.json"]
    assert names_in(one / MAPS) == names_in(many / MAPS) == names
    for name in names:
        assert (one / MAPS / name).read_bytes() == (many / MAPS / name).read_bytes()
    assert [row["index"] for row in read_shard(one / MAPS / names[1]).rows] == [4, 5, 6, 7]


def test_an_interrupted_merge_is_done_again(tmp_path):
    folder = parts_folder(tmp_path / "run", [range(6)])
    merge_parts(folder, 2)
    expected = {path.name: path.read_bytes() for path in (folder / MAPS).iterdir()}
    (folder / MAPS / "00001.safetensors").unlink()
    (folder / MAPS / "00009.safetensors").write_bytes(b"left by a run with smaller shards")
    merge_parts(folder, 2)
    assert {path.name: path.read_bytes() for path in (folder / MAPS).iterdir()} == expected


def test_finished_images_of_an_interrupted_and_of_a_complete_run(tmp_path):
    folder = parts_folder(tmp_path / "run", [[0, 2], [5]])
    assert finished_indices(folder) == {0, 2, 5}
    merge_parts(folder, 2)
    write_run(folder, {**run_description(), "status": "complete"})
    remove_parts(folder)
    assert not (folder / PARTS).exists()
    assert finished_indices(folder) == {0, 2, 5}


def test_images_are_added_to_a_complete_run(tmp_path):
    folder = parts_folder(tmp_path / "run", [[0, 1]])
    merge_parts(folder, 4)
    remove_parts(folder)
    (folder / PARTS).mkdir()
    shard([2], ["2.jpg"]).write(folder / PARTS / "new.safetensors")
    reopen_maps(folder)
    assert shard_files(folder / MAPS) == []
    assert merge_parts(folder, 4) == 3
    fresh = parts_folder(tmp_path / "fresh", [range(3)])
    merge_parts(fresh, 4)
    assert (folder / MAPS / "00000.safetensors").read_bytes() == (fresh / MAPS / "00000.safetensors").read_bytes()


def test_run_description_round_trip(tmp_path):
    assert read_run(tmp_path) is None
    run = {**run_description(), "status": "complete", "class_names": ["ü"]}
    write_run(tmp_path, run)
    assert read_run(tmp_path) == run
    for content in ("{", "[]", '{"name": "of another program"}'):
        (tmp_path / "run.json").write_text(content)
        with pytest.raises(ValueError, match=r"run\.json.*another output folder"):
            read_run(tmp_path)


def test_sha256():
    file = io.BytesIO(b"abc")
    # FIPS 180-2, appendix B.1
    assert sha256(file) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert file.read() == b"abc"
