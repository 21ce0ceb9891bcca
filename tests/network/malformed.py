"""Checkpoints of every format to spoil, and what may come of loading them."""

import time

import torch

from gmarpp.network.files.load import load_model

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
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


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
    start = time.process_time()
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
    assert time.process_time() - start < 5
    return loaded
