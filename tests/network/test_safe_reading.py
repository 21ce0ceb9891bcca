"""No file runs code, and none takes long or much memory to refuse."""

import collections
import json
import os
import pickle
import zipfile

import pytest
import torch
from malformed import CONFIG, ends_well


class Runs:
    """Makes a folder when it is unpickled."""

    def __init__(self, call, *arguments):
        self.call, self.arguments = call, arguments

    def __reduce__(self):
        return self.call, self.arguments


class Restores:
    """Runs code by its state, not by its construction."""

    def __reduce__(self):
        return collections.OrderedDict, (), Runs(os.mkdir, "ran")


def hostile_pickles():
    yield Runs(os.mkdir, "ran")
    yield Runs(os.system, "mkdir ran")
    yield Runs(eval, "__import__('os').mkdir('ran')")
    yield Runs(exec, "import os; os.mkdir('ran')")
    yield Runs(getattr, Runs(__import__, "os"), "mkdir")
    yield Runs(torch.load, "other.pth", None, pickle)
    yield Restores()


@pytest.mark.parametrize("place", ["value", "key", "all", "state", "legacy", "protocol 0"])
@pytest.mark.parametrize("suffix", [".ckpt", ".pth", ".pt", ".bin", ".pth.tar", "folder"])
def test_hostile_pickles_are_not_run(tmp_path, monkeypatch, network, suffix, place):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    torch.save(Runs(os.mkdir, "ran"), "other.pth")
    path = tmp_path / f"x{suffix}"
    if suffix == "folder":
        path = tmp_path / "folder"
        path.mkdir()
        (path / "config.json").write_text(json.dumps(CONFIG))
    file = path / "pytorch_model.bin" if suffix == "folder" else path
    for hostile in hostile_pickles():
        state = network.state_dict()
        content = {
            "value": {"state_dict": state, "extra": hostile},
            "key": {"state_dict": state, (hostile,): 1},
            "all": hostile,
            "state": {"state_dict": {**state, "norm.weight": hostile}},
        }.get(place, {"state_dict": state, "extra": hostile})
        try:
            if place == "protocol 0":
                file.write_bytes(pickle.dumps(hostile, protocol=0))
            else:
                torch.save(content, file, _use_new_zipfile_serialization=place != "legacy")
        except TypeError:  # such a thing cannot be a key
            continue
        assert not ends_well(path, network, architecture="vit_tiny_patch16_224")
        assert not (tmp_path / "ran").exists()


def zip_bomb(path):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/data.pkl", bytes(50_000_000))
        archive.writestr("x/version", "3\n")


def duplicate_records(path):
    torch.save({"state_dict": {}}, path)
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr(archive.namelist()[0], archive.read(archive.namelist()[0]))


def nested(path):
    value = []
    for _ in range(400):
        value = [value, value]
    torch.save({"state_dict": {}, "extra": value}, path)


def shared(path):
    value = ["x"]
    for _ in range(30):
        value = [value] * 9
    torch.save({"state_dict": {}, "extra": value}, path)


def endless(path):
    value = {}
    value["itself"] = value
    torch.save({"state_dict": value}, path)


def expanded(path):
    torch.save({"state_dict": {"norm.weight": torch.zeros(1).expand(10**6, 10**6)}}, path)


def many_views(path):
    block = torch.zeros(10_000)
    torch.save({"state_dict": {f"blocks.{index}": block.view(100, 100) for index in range(1000)}}, path)


def without_values(path):
    torch.save({"state_dict": {"norm.weight": torch.zeros(10**6, 10**6, device="meta")}}, path)


def sparse(path):
    torch.save({"state_dict": {"norm.weight": torch.zeros(16).to_sparse()}}, path)


def a_list(path):
    torch.save([1, 2], path)


def no_tensors(path):
    torch.save({"state_dict": {"norm.weight": 1}}, path)


def numbered(path):
    torch.save({"state_dict": {0: torch.zeros(1)}}, path)


def long_opcode(path):
    path.write_bytes(b"\x80\x02\x8b\xff\xff\xff\x7f" + bytes(100))


def deep_opcodes(path):
    path.write_bytes(b"\x80\x02" + b"(" * 100_000 + b"l" * 100_000 + b".")


def web_page(path):
    path.write_text("<!DOCTYPE html><html><title>404</title></html>")


def pointer(path):
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")


def empty(path):
    path.touch()


@pytest.mark.parametrize("suffix", [".ckpt", ".pth"])
@pytest.mark.parametrize(
    "make",
    [
        *(zip_bomb, duplicate_records, nested, shared, endless, expanded, many_views, without_values, sparse, a_list),
        *(no_tensors, numbered, long_opcode, deep_opcodes, web_page, pointer, empty),
    ],
)
def test_bombs_and_strangers(tmp_path, network, make, suffix):
    path = tmp_path / f"x{suffix}"
    make(path)
    assert not ends_well(path, network, architecture="vit_tiny_patch16_224")
