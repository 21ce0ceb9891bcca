"""Hiera, ViTDet and the encoders of SAM and SAM 2 in transformers: the same weights give the same maps as in timm."""

import pytest
import torch
import transformers
from test_families import images, relative_error
from test_pooled_queries import BALANCED, PRODUCTS, timm_hiera, timm_sam, timm_sam2

import gmarpp


def transformers_hiera():
    sizes = {"embed_dim": 8, "image_size": [32, 32], "depths": [1, 2, 1], "num_heads": [1, 2, 4], "num_query_pool": 2}
    sizes |= {"masked_unit_size": [4, 4], "masked_unit_attention": [True, False, False], "num_labels": 5}
    model = transformers.HieraForImageClassification(transformers.HieraConfig(mlp_ratio=2.0, **sizes))
    twin = timm_hiera((32, 32), patch_kernel=(7, 7), patch_padding=(3, 3))
    names = {"hiera.embeddings.position_embeddings": "pos_embed", "hiera.embeddings.patch_embeddings": "patch_embed"}
    names |= {"projection": "proj", "hiera.pooler.layernorm": "head.norm", "classifier": "head.fc"}
    layers = [f"hiera.encoder.stages.{stage}.layers.{layer}." for stage, layer in ((0, 0), (1, 0), (1, 1), (2, 0))]
    names |= {layer: f"blocks.{index}." for index, layer in enumerate(layers)}
    return model, twin, names | {"layernorm_before": "norm1", "layernorm_after": "norm2"}


def transformers_sam2():
    sizes = {"hidden_size": 8, "blocks_per_stage": [1, 2, 2], "embed_dim_per_stage": [8, 16, 32]}
    sizes |= {"num_attention_heads": 1, "num_attention_heads_per_stage": [1, 2, 4], "num_query_pool_stages": 2}
    sizes |= {"window_size_per_stage": [4, 4, 2], "global_attention_blocks": [2], "patch_kernel_size": [4, 4]}
    sizes |= {"patch_padding": [0, 0], "window_positional_embedding_background_size": [7, 7]}
    config = transformers.Sam2HieraDetConfig(**sizes, attn_implementation="sdpa")
    names = {"projection": "proj", "layer_norm": "norm", "mlp.proj_in": "mlp.fc1", "mlp.proj_out": "mlp.fc2"}
    return transformers.models.sam2.modeling_sam2.Sam2HieraDetModel(config), Features(timm_sam2()), names


def transformers_sam():
    sizes = {"image_size": 32, "patch_size": 4, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
    sizes |= {"mlp_dim": 32, "window_size": 3, "global_attn_indexes": [1], "output_channels": 8}
    model = transformers.SamVisionModel(transformers.SamVisionConfig(**sizes))
    names = {"vision_encoder.": "", "layers.": "blocks.", "projection": "proj", "mlp.lin": "mlp.fc"}
    names |= {
        "neck.conv1": "neck.0",
        "neck.layer_norm1": "neck.1",
        "neck.conv2": "neck.2",
        "neck.layer_norm2": "neck.3",
    }
    return model, Features(timm_sam()), names | {"layer_norm": "norm"}


def transformers_vit_det():
    sizes = {"image_size": 32, "patch_size": 4, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
    sizes |= {"mlp_ratio": 2, "window_size": 3, "window_block_indices": [0, 2], "pretrain_image_size": 32}
    model = transformers.VitDetModel(transformers.VitDetConfig(**sizes, use_relative_position_embeddings=True))
    names = {"encoder.layer.": "blocks.", "attention.": "attn.", "embeddings.projection": "patch_embed.proj"}
    twin = timm_sam()
    twin.neck = torch.nn.Identity()
    return model, Features(twin), names | {"embeddings.position_embeddings": "pos_embed"}


class Features(torch.nn.Module):
    """What a network of timm makes before its head, in place of the network."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, batch):
        return self.model.forward_features(batch)


@pytest.mark.parametrize(
    ("kind", "methods"),
    [
        ("sam_hq.SamHQ", ("gmarpp_l1", *BALANCED)),
        ("got_ocr2.GotOcr2", ("gmarpp_l1", *BALANCED)),
        # Further convolutions follow, which read all tokens.
        ("deepseek_ocr2.DeepseekOcr2Sam", ("rollout",)),
    ],
)
def test_copies_of_the_encoder_of_sam_give_the_same_maps(kind, methods):
    folder, name = kind.split(".")
    encoder = getattr(getattr(transformers.models, folder), f"modeling_{folder}")
    sizes = {"image_size": 32, "patch_size": 4, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"mlp_dim": 32, "window_size": 3, "global_attn_indexes": [1], "output_channels": 8}
    model = getattr(encoder, f"{name}VisionEncoder")(getattr(encoder, f"{name}VisionConfig")(**sizes)).eval()
    source = transformers.SamVisionModel(transformers.SamVisionConfig(**sizes)).eval().vision_encoder
    for parameter in source.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.load_state_dict(source.state_dict(), strict=False)

    def score(output):
        return getattr(output, "last_hidden_state", output[0])[:, :4].tanh().sum((1, 2, 3))

    ours, theirs = (gmarpp.explain(each, images(), methods, score).maps for each in (model, source))
    assert all(relative_error(ours[method], theirs[method]) < 1e-4 for method in ours)


@pytest.mark.parametrize("make", [transformers_hiera, transformers_sam2, transformers_sam, transformers_vit_det])
def test_weights_of_transformers_give_the_same_maps_in_timm(make):
    source, model, names = make()
    state = {}
    for parameter in source.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    for key, value in source.state_dict().items():
        for old, new in names.items():
            key = key.replace(old, new)
        # ViTDet has a place for a class token, and its places in a row.
        state[key] = value[:, 1:].unflatten(1, (8, 8)) if make is transformers_vit_det and key == "pos_embed" else value
    missing = getattr(model, "model", model).load_state_dict(state, strict=False)
    assert not missing.unexpected_keys
    assert all(key.startswith("head.") for key in missing.missing_keys)

    def score(output):
        output = getattr(output, "logits", getattr(output, "last_hidden_state", output))
        return output.flatten(1)[:, 1::3].tanh().sum(1)

    # ViTDet adds its attention in another layout than that in which its blocks are given tokens.
    also = {transformers_sam: (*BALANCED, "legrad"), transformers_vit_det: ("token_relevance", "legrad")}
    methods = (*PRODUCTS, *also.get(make, BALANCED))
    ours, theirs = (gmarpp.explain(each.eval(), images(), methods, score) for each in (model, source))
    torch.testing.assert_close(ours.scores, theirs.scores, rtol=1e-4, atol=1e-4)
    for method, maps in ours.maps.items():
        assert maps.std() > 0
        assert relative_error(maps, theirs.maps[method]) < 1e-3, method
