"""Damage never gives other weights, and nothing but a file is opened."""

import collections
import hashlib
import itertools
import os
import random
import re
import socket

import pytest
import torch
from malformed import IMAGES, TINY, ends_well
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from gmarpp.network.build import build_model
from gmarpp.network.files.formats import read_weights
from gmarpp.network.files.load import load_model, load_weights
from gmarpp.network.files.save import save_weights


def damage(raw, seed, rounds):
    """Yields the content of a file with flipped bits, cut at all scales, and with parts zeroed, replaced and lost."""
    source = random.Random(seed)
    for _ in range(rounds):
        spoiled = bytearray(raw)
        edge = source.randrange(min(2000, len(raw)))
        place = source.choice([source.randrange(len(raw)), edge, len(raw) - 1 - edge])
        spoiled[place] ^= 1 << source.randrange(8)
        yield "flip", bytes(spoiled)
        yield "cut", raw[: int(len(raw) ** source.random())]
        spoiled = bytearray(raw)
        length = int(2000 ** source.random())
        spoiled[place : place + length] = source.choice([bytes(length), source.randbytes(length), b""])
        yield "block", bytes(spoiled)


def check_damage(network, write, tmp_path, seed, rounds):
    """Shared with longer runs: counts what was loaded, by kind of file and of damage."""
    loaded = collections.Counter()
    write("safetensors")
    save_weights(network, tmp_path / "x.safetensors")
    torch_kinds = [write("ckpt"), write("pth")]
    torch.save(network.state_dict(), torch_kinds[1])
    for path, architecture in ((tmp_path / "x.safetensors", None), (torch_kinds[0], None)):
        raw = path.read_bytes()
        for kind, spoiled in damage(raw, seed, rounds):
            path.write_bytes(spoiled)
            # torch.save's padding, dates and attributes of a record carry nothing
            may_load = spoiled == raw or (path.suffix == ".ckpt" and kind != "cut")
            loaded[path.suffix, kind] += ends_well(path, network, may_load, architecture)
            loaded["all"] += 1
    return loaded


def test_damaged_bytes_never_give_other_weights(network, write, tmp_path):
    loaded = check_damage(network, write, tmp_path, seed=0, rounds=40)
    assert loaded["all"] == 240
    assert loaded[".ckpt", "flip"] < 20  # most flips hit what a checksum covers


def test_no_flipped_bit_of_the_digest_and_its_names_hides_it(network, tmp_path):
    path = tmp_path / "x.safetensors"
    save_weights(network, path)
    raw = path.read_bytes()
    names = [match.span() for match in re.finditer(rb'"digest":"content_sha256"|"content_sha256":"\w{64}"', raw)]
    assert len(names) == 2
    for place in itertools.chain.from_iterable(range(*span) for span in names):
        for bit in range(8):
            spoiled = bytearray(raw)
            spoiled[place] ^= 1 << bit
            path.write_bytes(spoiled)
            assert not ends_well(path, network)


@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors", ".pth", ".pth.tar"])
def test_what_is_no_file_is_not_opened(tmp_path, network, suffix):
    path = tmp_path / f"x{suffix}"
    os.mkfifo(path)
    assert not ends_well(path, network)
    path.unlink()
    path.mkdir()
    assert not ends_well(path, network)
    path.rmdir()
    path.symlink_to("/dev/zero")
    assert not ends_well(path, network)
    path.unlink()
    path.symlink_to(path)
    with pytest.raises((OSError, ValueError), match=path.name):
        load_model(path)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(tmp_path / f"s{suffix}"))
        assert not ends_well(tmp_path / f"s{suffix}", network)


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json", "model.safetensors"])
def test_pipes_in_a_folder_are_not_opened(write, network, name):
    folder = write("folder")
    (folder / name).unlink()
    os.mkfifo(folder / name)
    assert not ends_well(folder, network)


def test_a_file_in_the_hubs_cache_is_what_its_name_says(write, network, tmp_path):
    folder = write("folder")
    stored = tmp_path / "blobs" / hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    stored.parent.mkdir()
    (folder / "model.safetensors").replace(stored)
    (folder / "model.safetensors").symlink_to(stored)
    assert ends_well(folder, network, may_load=True)
    raw = bytearray(stored.read_bytes())
    raw[-5] ^= 1
    stored.write_bytes(raw)
    assert not ends_well(folder, network)


def test_a_digest_covers_weights_and_description(network, tmp_path):
    save_weights(network, tmp_path / "x.safetensors", notes={"recipe": "none"})
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        metadata = file.metadata()
    state = load_file(tmp_path / "x.safetensors")
    for field, value in (("num_classes", "2"), ("mean", "[0.1, 0.1, 0.1]"), ("recipe", "other")):
        save_file(state, tmp_path / "x.safetensors", metadata={**metadata, field: value})
        with pytest.raises(ValueError, match="its content has changed"):
            load_model(tmp_path / "x.safetensors")
    state["norm.bias"] = -state["norm.bias"]
    save_file(state, tmp_path / "x.safetensors", metadata=metadata)
    with pytest.raises(ValueError, match="its content has changed"):
        load_model(tmp_path / "x.safetensors")


def test_files_without_checksums_load_with_a_warning(network, tmp_path, caplog):
    torch.save(network.state_dict(), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(network.state_dict(), tmp_path / "bare.pth")
    finally:
        torch.serialization.set_crc32_options(True)
    model = build_model("vit_tiny_patch16_224", 3, 32, TINY)
    for name in ("old.pth", "bare.pth"):
        caplog.clear()
        assert load_weights(model, read_weights(tmp_path / name))
        assert torch.equal(model.eval()(IMAGES), network(IMAGES))
        assert "checksums" in caplog.text
