"""What a checkpoint says of its network is right, or one clear error names it."""

import json
import math

import pytest
import torch
from malformed import CLASSES, CONFIG, HYPER_PARAMETERS, PREPROCESSOR, TINY, ends_well

from gmarpp.network.files.load import load_model

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


def test_the_unchanged_files_give_the_network(write, network):
    for kind in ("safetensors", "ckpt", "folder"):
        path = write(kind)
        assert ends_well(path, network, may_load=True)
        model = load_model(path)
        assert model.class_names == tuple(CLASSES)
        assert model.pretrained_cfg["crop_pct"] == 1 or kind == "safetensors"


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
