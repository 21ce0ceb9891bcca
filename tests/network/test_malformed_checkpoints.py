"""Whatever a checkpoint holds ends in the right network or in one clear error, soon, and runs no code."""

import collections
import hashlib
import json
import math
import os
import pickle
import random
import socket
import time
import zipfile

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from gmarpp.network.build import build_model
from gmarpp.network.formats import read_weights
from gmarpp.network.load import load_model, load_weights
from gmarpp.network.save import save_weights

TINY = {"patch_size": 16, "depth": 2, "embed_dim": 16, "num_heads": 2}
CLASSES = ["ant", "bee", "cat"]
PREPROCESSING = {"mean": [0.4, 0.5, 0.6], "std": [0.1, 0.2, 0.3], "interpolation": "bilinear", "crop_pct": 1.0}
HYPER_PARAMETERS = {
    "architecture": "vit_tiny_patch16_224",
    "num_classes": 3,
    "image_size": [32, 32],
    "model_args": TINY,
    "preprocessing": PREPROCESSING,
}
CONFIG = {
    "model_type": "vit",
    "image_size": 32,
    "patch_size": 16,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-6,
    "qkv_bias": True,
    "id2label": {"0": "ant", "1": "bee", "2": "cat"},
}
PREPROCESSOR = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.1, 0.2, 0.3], "resample": 2, "do_normalize": True}
# Each is wrong for every field of every description.
WRONG = [None, [], {}, [1], [[]], "x", "", {"0": 1}, -1, 0.5, math.nan, math.inf, 10**30, [1, 2, 3, 4, 5], True]
# What is allowed, and means that the file does not say, or another value.
RIGHT = {
    ("safetensors", "img_size"): [None],
    ("safetensors", "num_classes"): [None],
    ("safetensors", "classes"): [[]],
    ("safetensors", "class_names"): [[]],
    ("safetensors", "crop_pct"): [0.5],
    ("ckpt", "preprocessing"): [{}],
    ("folder", "id2label"): [None, {}],
    ("folder", "qkv_bias"): [True],
    ("folder", "do_normalize"): [True],
    ("folder", "layer_norm_eps"): [0.5],
}
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    model = build_model("vit_tiny_patch16_224", 3, 32, TINY).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    model.classes = model.class_names = tuple(CLASSES)
    return model


@pytest.fixture
def write(network, tmp_path):
    """Writes one of the formats, with its description or state dict changed."""

    def write(kind, change=lambda description, state: None):
        state = {key: value.clone() for key, value in network.state_dict().items()}
        if kind == "safetensors":
            save_weights(network, tmp_path / "x.safetensors")
            with safe_open(tmp_path / "x.safetensors", "pt") as file:
                metadata = {key: value for key, value in file.metadata().items() if key != "content_sha256"}
            change(metadata, state)
            save_file(state, tmp_path / "x.safetensors", metadata=metadata)
            return tmp_path / "x.safetensors"
        if kind == "ckpt":
            options = json.loads(json.dumps(HYPER_PARAMETERS))
            content = {"hyper_parameters": options, "classes": list(CLASSES), "class_names": list(CLASSES)}
            change({"content": content, **options}, state)
            content["state_dict"] = {f"model.{key}": value for key, value in state.items()}
            torch.save(content, tmp_path / "x.ckpt")
            return tmp_path / "x.ckpt"
        if kind == "pth":
            torch.save({"arch": "vit_tiny_patch16_224", "state_dict": state}, tmp_path / "x.pth")
            return tmp_path / "x.pth"
        folder = tmp_path / "folder"
        folder.mkdir(exist_ok=True)
        config, preprocessor = json.loads(json.dumps([CONFIG, PREPROCESSOR]))
        theirs = as_hugging_face(state)
        change({"config": config, "preprocessor": preprocessor}, theirs)
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
        save_file(theirs, folder / "model.safetensors")
        return folder

    return write


def as_hugging_face(state):
    parts = {
        "norm1": "layernorm_before",
        "attn.proj": "attention.output.dense",
        "norm2": "layernorm_after",
        "mlp.fc1": "intermediate.dense",
        "mlp.fc2": "output.dense",
    }
    theirs = {
        "vit.embeddings.cls_token": state["cls_token"],
        "vit.embeddings.position_embeddings": state["pos_embed"],
    }
    for kind in ("weight", "bias"):
        theirs[f"vit.embeddings.patch_embeddings.projection.{kind}"] = state[f"patch_embed.proj.{kind}"]
        theirs[f"vit.layernorm.{kind}"] = state[f"norm.{kind}"]
        theirs[f"classifier.{kind}"] = state[f"head.{kind}"]
        for layer in range(2):
            for ours, name in parts.items():
                theirs[f"vit.encoder.layer.{layer}.{name}.{kind}"] = state[f"blocks.{layer}.{ours}.{kind}"]
            for part, values in zip(
                ("query", "key", "value"), state[f"blocks.{layer}.attn.qkv.{kind}"].chunk(3), strict=True
            ):
                theirs[f"vit.encoder.layer.{layer}.attention.attention.{part}.{kind}"] = values.clone()
    return theirs


def ends_well(path, network, may_load=False, architecture=None):
    """Loads a file, and requires one clear error, or the right network where that is possible."""
    start = time.monotonic()
    try:
        model = load_model(path, architecture)
    except (ValueError, FileNotFoundError) as error:
        message = str(error)
        assert path.name in message
        assert "\n" not in message
        assert len(message) < 1000
        loaded = False
    else:
        assert may_load
        assert torch.equal(model(IMAGES), network(IMAGES))
        assert model.num_classes == network.num_classes
        loaded = True
    assert time.monotonic() - start < 5
    return loaded


def test_the_unchanged_files_give_the_network(write, network):
    for kind in ("safetensors", "ckpt", "folder"):
        path = write(kind)
        assert ends_well(path, network, may_load=True)
        model = load_model(path)
        assert model.class_names == tuple(CLASSES)
        assert model.pretrained_cfg["crop_pct"] == 1 or kind == "safetensors"


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


@pytest.mark.parametrize("kind", ["safetensors", "ckpt", "folder"])
def test_wrong_descriptions_are_named(write, network, kind):
    """Every field of every format gets every wrong value."""
    if kind == "safetensors":
        fields = {key: key for key in ("img_size", "num_classes", "model_args", "classes", "mean", "std", "crop_pct")}
        fields |= {key: key for key in ("architecture", "class_names", "interpolation")}
    elif kind == "ckpt":
        fields = {key: key for key in HYPER_PARAMETERS}
    else:
        fields = dict.fromkeys(CONFIG, "config") | dict.fromkeys(PREPROCESSOR, "preprocessor")
    cases = 0
    for field, where in fields.items():
        for value in WRONG:
            if any(type(value) is type(right) and value == right for right in RIGHT.get((kind, field), [])):
                continue

            def spoil(description, _, field=field, where=where, value=value):
                if kind == "safetensors":
                    description[field] = value if isinstance(value, str) else json.dumps(value)
                elif kind == "ckpt":
                    description["content"]["hyper_parameters"][field] = value
                else:
                    description[where][field] = value

            assert not ends_well(write(kind, spoil), network), (field, value)
            cases += 1
    assert cases > 60


@pytest.mark.parametrize(
    "options",
    [
        {"depth": 1_000_000},
        {"depth": 10**9},
        {"depth": -1},
        {"depth": 0},
        {"depth": 3},
        {"embed_dim": 10**6},
        {"num_heads": 0},
        {"num_heads": 3},
        {"patch_size": 0},
        {"patch_size": 8},
        {"mlp_ratio": 1e6},
        {"mlp_ratio": -1.0},
        {"img_size": 64},
        {"num_classes": 7},
        {"in_chans": 4},
        {"features_only": True},
        {"block_fn": "os.system"},
        {"class_token": False},
        {"global_pool": "nothing"},
        {"reg_tokens": 4},
    ],
)
@pytest.mark.parametrize("kind", ["safetensors", "ckpt"])
def test_options_that_the_weights_do_not_have(write, network, kind, options):
    def change(description, _):
        if kind == "safetensors":
            description["model_args"] = json.dumps({**TINY, **options})
        else:
            description["content"]["hyper_parameters"]["model_args"].update(options)

    assert not ends_well(write(kind, change), network)


@pytest.mark.parametrize("kind", ["safetensors", "ckpt", "folder"])
@pytest.mark.parametrize("fault", ["missing", "extra", "shape", "integer", "nan", "infinite", "size", "complex"])
def test_weights_that_do_not_fit(write, network, kind, fault):
    def change(description, state):
        norm = "vit.layernorm.weight" if kind == "folder" else "norm.weight"
        embedding = "vit.embeddings.position_embeddings" if kind == "folder" else "pos_embed"
        if fault == "missing":
            state.pop(norm)
        elif fault == "extra":
            state["vit.encoder.layer.2.output.dense.bias"] = torch.zeros(16)
        elif fault == "size":
            # as many tokens as 64 pixels have: resampled in silence it would be another network
            state[embedding] = torch.randn(1, 17, 16)
        else:
            state[norm] = {
                "shape": torch.ones(17),
                "integer": torch.ones(16, dtype=torch.int32),
                "nan": torch.full((16,), math.nan),
                "infinite": torch.full((16,), math.inf),
                "complex": torch.ones(16, dtype=torch.complex64),
            }[fault]

    assert not ends_well(write(kind, change), network)


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


def header_of(path, text, header_length=None):
    raw = text.encode()
    path.write_bytes((len(raw) if header_length is None else header_length).to_bytes(8, "little") + raw)


@pytest.mark.parametrize(
    ("text", "length"),
    [
        ("{}", None),
        ("{}", 2**63),
        ("{}", 10**8),
        ("[]", None),
        ("[" * 100_000, None),
        ('{"a":' * 100_000, None),
        ('{"x": {"dtype": "F32", "shape": [1000000, 1000000], "data_offsets": [0, 4]}}', None),
        ('{"x": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}', None),
        ('{"x": {"dtype": "F32", "shape": [18446744073709551615, 4], "data_offsets": [0, 4]}}', None),
        ('{"__metadata__": {"model_args": 3}}', None),
        (
            '{"__metadata__": {"architecture": "test_vit", "model_args": "{\\"depth\\": 1, \\"depth\\": 2}"}}',
            None,
        ),
        ('{"__metadata__": {"architecture": "local-dir:/tmp", "num_classes": "3", "img_size": "32"}}', None),
        ('{"__metadata__": {"architecture": "hf-hub:timm/vit", "num_classes": "3", "img_size": "32"}}', None),
        ("nul", None),
        ("", None),
    ],
)
def test_headers(tmp_path, network, text, length):
    path = tmp_path / "x.safetensors"
    header_of(path, text, length)
    assert not ends_well(path, network)


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json"])
@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "3",
        "null",
        "{",
        "[" * 100_000,
        '{"model_type": "vit", "model_type": "vit"}',
        "\udcff",
        '{"a": 1e999999}',
        '{"model_type": ["vit"]}',
        '{"architecture": 3}',
        '{"architecture": "test_vit", "pretrained_cfg": []}',
        '{"architecture": "test_vit", "pretrained_cfg": {"input_size": [3]}}',
        " " * 17_000_000,
        "9" * 10_000,
    ],
)
def test_configurations_of_folders(write, network, name, text):
    folder = write("folder")
    (folder / name).write_bytes(text.encode("utf-8", "surrogateescape"))
    fine = name != "config.json" and text.startswith("{") and text.endswith("}") and 'model_type": "vit", ' not in text
    assert ends_well(folder, network, may_load=fine) is fine


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
