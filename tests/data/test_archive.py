import hashlib
import os
import zipfile

import pytest
from miniature import tiny_imagenet

from gmarpp.data import archive
from gmarpp.data.archive import download, extract, require_same_archive


def find(folder):
    if not (folder / "data").is_dir():
        raise FileNotFoundError
    return folder / "data"


def zipped(path, **files):
    with zipfile.ZipFile(path, "w") as file:
        for name, content in files.items():
            file.writestr(name.replace("__", "/"), content)
    return path


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_extracts_to_a_new_name_and_leaves_nothing_else(tmp_path):
    source = zipped(tmp_path / "source.zip", data__a="1", data__b__c="2", junk__data__a="junk")
    extract(source, tmp_path / "target" / "name", find)
    assert names(tmp_path / "target") == ["name"]
    assert (tmp_path / "target" / "name" / "b" / "c").read_text() == "2"


@pytest.mark.parametrize("content", ["1", "2"])
def test_made_in_the_meantime_by_another_process(tmp_path, content):
    source = zipped(tmp_path / "source.zip", data__a="1")

    def find_late(folder):
        # the other process ends while this one extracts
        extract(zipped(tmp_path / "theirs.zip", data__a=content), tmp_path / "target", find)
        return find(folder)

    if content == "1":
        (tmp_path / "theirs.zip").write_bytes(source.read_bytes())
        extract(source, tmp_path / "target", find_late)
    else:
        with pytest.raises(ValueError, match=r"target was extracted from another archive than .*source\.zip"):
            extract(source, tmp_path / "target", find_late)
    assert names(tmp_path) == ["source.zip", "target", "theirs.zip"]
    assert (tmp_path / "target" / "a").read_text() == content


def test_a_folder_of_unknown_origin_is_used_with_a_warning(tmp_path, caplog):
    source, target = zipped(tmp_path / "source.zip", data__a="1"), tmp_path / "target"
    extract(source, target, find)
    require_same_archive(source, target)
    assert "no record" not in caplog.text
    (target / ".archive").unlink()
    require_same_archive(source, target)
    assert "target has no record of its archive" in caplog.text


def test_archives_that_are_not_sound(tmp_path, monkeypatch):
    def refused(message, target="target"):
        with pytest.raises(ValueError, match=message):
            extract(tmp_path / "source.zip", tmp_path / "out" / target, find)
        assert names(tmp_path / "out") == []

    with zipfile.ZipFile(tmp_path / "source.zip", "w") as file:
        file.writestr("data/a", "1")
        with pytest.warns(UserWarning, match="Duplicate name"):
            file.writestr("data/a", "2")
    refused(r"source\.zip holds 'data/a' twice")
    zipped(tmp_path / "source.zip", data="1", data__a="2")
    refused(r"source\.zip is damaged or not a zip file")
    zipped(tmp_path / "source.zip", **{"data__" + "a" * 300: "1"})
    refused(r"source\.zip is damaged or not a zip file .*name too long")
    # a member whose header promises less than it holds
    whole = zipped(tmp_path / "source.zip", data__a="1" * 1000).read_bytes()
    (tmp_path / "source.zip").write_bytes(whole.replace((1000).to_bytes(4, "little"), (10).to_bytes(4, "little")))
    refused(r"source\.zip is damaged or not a zip file")
    zipped(tmp_path / "source.zip", data__a="1", data__b="2")
    monkeypatch.setattr(archive, "MAX_FILES", 1)
    refused(r"source\.zip holds 2 files of 0 MiB, expected at most 1 of")
    monkeypatch.undo()
    monkeypatch.setattr(archive, "MAX_BYTES", 1)
    refused(r"source\.zip holds 2 files of 0 MiB")
    (tmp_path / "source.zip").unlink()
    os.mkfifo(tmp_path / "source.zip")
    refused(r"source\.zip is a named pipe, expected a file")


@pytest.mark.parametrize("name", ["../escaped", "data/../../escaped", "/escaped", "C:\\escaped"])
def test_paths_that_lead_outside(tmp_path, name):
    source = tmp_path / "source.zip"
    with zipfile.ZipFile(source, "w") as file:
        file.writestr("data/a", "1")
        file.writestr(name, "2")
    (tmp_path / "target").mkdir()
    with pytest.raises(ValueError, match=r"source\.zip is not safe to extract: '.*escaped' leads outside"):
        extract(source, tmp_path / "target" / "name", find)
    assert not list(tmp_path.rglob("*escaped*"))
    assert names(tmp_path / "target") == []


def test_damaged_archives_are_named_and_kept(tmp_path):
    tiny_imagenet(tmp_path / "made")
    whole = zipped(tmp_path / "whole.zip", data__a="text" * 1000).read_bytes()
    flipped = bytearray(whole)
    flipped[200] ^= 255
    for name, content in (("half.zip", whole[: len(whole) // 2]), ("flipped.zip", flipped), ("text.zip", b"text")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=rf"{name} is damaged or not a zip file"):
            extract(tmp_path / name, tmp_path / "out" / "target", find)
        assert (tmp_path / name).read_bytes() == content
        assert names(tmp_path / "out") == []


def test_archive_without_the_data(tmp_path):
    source = zipped(tmp_path / "source.zip", other__a="1")
    with pytest.raises(FileNotFoundError, match=r"source\.zip does not hold a folder like tiny"):
        extract(source, tmp_path / "tiny", find)
    with pytest.raises(FileNotFoundError, match=r"absent\.zip"):
        extract(tmp_path / "absent.zip", tmp_path / "tiny", find)


def test_no_room(tmp_path, monkeypatch):
    source = zipped(tmp_path / "source.zip", data__a="1" * (3 << 20))
    usage = archive.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(archive.shutil, "disk_usage", lambda _: usage._replace(free=1 << 20))
    with pytest.raises(OSError, match=r"needs 3 MiB in .*, but 1 MiB are free"):
        extract(source, tmp_path / "target", find)
    assert names(tmp_path) == ["source.zip"]


def test_download_is_verified(tmp_path):
    source = tmp_path / "remote.zip"
    source.write_bytes(b"content")
    md5 = hashlib.md5(b"content").hexdigest()
    target = tmp_path / "new" / "local.zip"
    with pytest.raises(ValueError, match=r"remote\.zip arrived damaged and was removed: expected md5 0123"):
        download(source.as_uri(), target, "0123")
    assert names(tmp_path / "new") == []
    download(source.as_uri(), target, md5)
    assert target.read_bytes() == b"content"
    source.unlink()
    download(source.as_uri(), target, md5)  # it is there


def test_file_of_the_same_name_is_verified_and_kept(tmp_path):
    target = tmp_path / "local.zip"
    target.write_bytes(b"other")
    with pytest.raises(ValueError, match=r"local\.zip is damaged or another file.*Delete it"):
        download("file:///nowhere", target, "0123")
    assert target.read_bytes() == b"other"


def test_failed_download_leaves_nothing(tmp_path):
    with pytest.raises(OSError, match=r"downloading file:.*nowhere\.zip to .* failed"):
        download((tmp_path / "nowhere.zip").as_uri(), tmp_path / "new" / "local.zip", "0123")
    assert names(tmp_path / "new") == []
