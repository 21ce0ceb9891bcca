"""Networks of transformers, classifiers and towers, against the naive reference; heads are written out by hand."""

import functools

import pytest
import torch
import transformers
from naive_attribution import attention_and_gradients
from test_families import assert_equals_naive, images, relative_error, sharpened, timm_network
from torch import nn

import gmarpp

SMALL = {
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "intermediate_size": 96,
    "image_size": 32,
    "patch_size": 8,
}
TEXT = {"hidden_size": 48, "num_hidden_layers": 1, "num_attention_heads": 3, "intermediate_size": 96, "vocab_size": 99}


def hugging_face_network(kind, **options):
    torch.manual_seed(0)
    network = getattr(transformers, kind)
    parts = getattr(network.config_class, "sub_configs", {})
    config = (
        {"vision_config": SMALL, "text_config": TEXT} if {"vision_config", "text_config"} <= parts.keys() else SMALL
    )
    if "Classification" in kind:
        options["num_labels"] = 7
    model = sharpened(network(network.config_class(**(config | options), attn_implementation="sdpa")))
    for parameter in model.parameters():
        if parameter.abs().max() == 0:
            nn.init.normal_(parameter, std=0.02)
    return model


# kind: prefix tokens, tokens that the head reads, logits of the last block's tokens
CLASSIFIERS = {
    "ViTForImageClassification": (1, [0], lambda m, x: m.classifier(m.vit.layernorm(x)[:, 0])),
    "DeiTForImageClassification": (2, [0], lambda m, x: m.classifier(m.deit.layernorm(x)[:, 0])),
    "DeiTForImageClassificationWithTeacher": (2, [0, 1], lambda m, x: both_tokens(m, m.deit.layernorm(x))),
    "Dinov2ForImageClassification": (1, range(17), lambda m, x: class_and_mean(m, m.dinov2.layernorm(x), 1)),
    "Dinov2WithRegistersForImageClassification": (
        5, [0, *range(5, 21)], lambda m, x: class_and_mean(m, m.dinov2_with_registers.layernorm(x), 5),
    ),
    "SiglipForImageClassification": (
        0, range(16), lambda m, x: m.classifier(m.vision_model.post_layernorm(x).mean(1)),
    ),
    "CLIPForImageClassification": (
        1, range(1, 17), lambda m, x: m.classifier(x[:, 1:].mean(1)),
    ),
    "MetaClip2ForImageClassification": (1, range(1, 17), lambda m, x: m.classifier(x[:, 1:].mean(1))),
    "BeitForImageClassification": (
        1, range(1, 17), lambda m, x: m.classifier(m.beit.pooler.layernorm(x[:, 1:].mean(1))),
    ),
    "Data2VecVisionForImageClassification": (
        1, range(1, 17), lambda m, x: m.classifier(m.data2vec_vision.pooler.layernorm(x[:, 1:].mean(1))),
    ),
    "ViTMSNForImageClassification": (1, [0], lambda m, x: m.classifier(m.vit.layernorm(x)[:, 0])),
    "IJepaForImageClassification": (0, range(16), lambda m, x: m.classifier(m.ijepa.layernorm(x).mean(1))),
}  # fmt: skip


def both_tokens(model, tokens):
    return (model.cls_classifier(tokens[:, 0]) + model.distillation_classifier(tokens[:, 1])) / 2


def class_and_mean(model, tokens, first_patch):
    return model.classifier(torch.cat((tokens[:, 0], tokens[:, first_patch:].mean(1)), dim=1))


def logits_or_tensor(output):
    return output if isinstance(output, torch.Tensor) else output.logits


@pytest.mark.parametrize("kind", CLASSIFIERS)
def test_classifiers_equal_the_naive_reference(kind):
    prefix, read, head = CLASSIFIERS[kind]
    model, batch, target = hugging_face_network(kind), images(), torch.tensor([2, 5])
    score = lambda output: logits_or_tensor(output).gather(1, target[:, None])[:, 0]  # noqa: E731
    blocks = blocks_of(model)
    assert_equals_naive(model, batch, target, score, (4, 4), read, blocks, functools.partial(head, model), prefix)


def blocks_of(model):
    (blocks,) = [each for each in model.modules() if isinstance(each, nn.ModuleList) and len(each) == 3]
    return blocks


# kind: options, prefix tokens, suffix tokens, tokens that the score reads, what of the output, the same of the tokens
TOWERS = {
    "ViTModel": ({}, 1, 0, [0], "last_hidden_state", lambda m, x: m.layernorm(x)),
    "DeiTModel": ({}, 2, 0, [0], "last_hidden_state", lambda m, x: m.layernorm(x)),
    "Dinov2Model": ({}, 1, 0, [0], "pooler_output", lambda m, x: m.layernorm(x)[:, 0]),
    "Dinov2WithRegistersModel": ({}, 5, 0, [0], "pooler_output", lambda m, x: m.layernorm(x)[:, 0]),
    "DINOv3ViTModel": ({"num_register_tokens": 4}, 5, 0, [0], "pooler_output", lambda m, x: m.norm(x)[:, 0]),
    "BeitModel": ({}, 1, 0, [0], "last_hidden_state", lambda m, x: m.layernorm(x)),
    "Data2VecVisionModel": ({}, 1, 0, [0], "last_hidden_state", lambda m, x: m.layernorm(x)),
    "ViTMSNModel": ({}, 1, 0, [0], "last_hidden_state", lambda m, x: m.layernorm(x)),
    "IJepaModel": ({}, 0, 0, [0], "last_hidden_state", lambda m, x: m.layernorm(x)),
    "Aimv2VisionModel": ({}, 0, 0, None, "pooler_output", lambda m, x: m.head(m.rms_norm(x))),
    "SiglipVisionModel": ({}, 0, 0, None, "pooler_output", lambda m, x: m.head(m.post_layernorm(x))),
    "CLIPVisionModel": ({}, 1, 0, [0], "pooler_output", lambda m, x: m.post_layernorm(x[:, 0])),
    "CLIPVisionModelWithProjection": (
        {}, 1, 0, [0], "image_embeds", lambda m, x: m.visual_projection(m.vision_model.post_layernorm(x[:, 0])),
    ),
    "MetaClip2VisionModel": ({}, 1, 0, [0], "pooler_output", lambda m, x: m.post_layernorm(x[:, 0])),
    "AltCLIPVisionModel": ({}, 1, 0, [0], "pooler_output", lambda m, x: m.post_layernorm(x[:, 0])),
    "ChineseCLIPVisionModel": ({}, 1, 0, [0], "pooler_output", lambda m, x: m.post_layernorm(x[:, 0])),
    "Blip2VisionModel": ({"initializer_range": 0.02}, 1, 0, [0], "last_hidden_state", lambda m, x: m.post_layernorm(x)),
    "InternVLVisionModel": ({}, 1, 0, [0], "last_hidden_state", lambda m, x: m.layernorm(x)),
    "YolosModel": (
        {"image_size": [32, 32], "num_detection_tokens": 4},
        1, 4, [0], "last_hidden_state", lambda m, x: m.layernorm(x),
    ),
}  # fmt: skip


def of_first_token(values):
    """Score by a direction, of one vector per image or of the first token's."""
    first = values if values.dim() == 2 else values[:, 0]
    return first @ torch.linspace(-1, 1, first.shape[1])


@pytest.mark.parametrize("kind", TOWERS)
def test_towers_equal_the_naive_reference(kind):
    options, prefix, suffix, read, name, head = TOWERS[kind]
    model, batch = hugging_face_network(kind, **options), images()
    without_weights(model)
    score = lambda output: of_first_token(getattr(output, name))  # noqa: E731
    head = functools.partial(head, model)
    arguments = (model, batch, score, score, (4, 4), read, blocks_of(model), head, prefix, suffix)
    assert_equals_naive(*arguments, head_score=of_first_token)


def without_weights(model):
    """Let pools attend through the fused call for the naive reference too."""
    for module in model.modules():
        if isinstance(module, nn.MultiheadAttention):
            module.forward = functools.partial(module.forward, need_weights=False)


def test_a_pool_is_explained_although_its_weights_are_asked_for():
    model, batch = hugging_face_network("SiglipVisionModel"), images()
    score = lambda output: of_first_token(output.pooler_output)  # noqa: E731
    found = gmarpp.explain(model, batch, gmarpp.METHODS, score).maps
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    without_weights(model)
    expected = gmarpp.explain(model, batch, gmarpp.METHODS, score).maps
    assert all(relative_error(found[method], expected[method]) < 1e-5 for method in found)


class ImageFeatures(nn.Module):
    """What a user writes around a network of images and texts."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, batch):
        return self.model.get_image_features(pixel_values=batch).pooler_output


@pytest.mark.parametrize("kind", ["CLIPModel", "SiglipModel"])
def test_the_image_tower_of_a_network_of_images_and_texts_is_found(kind):
    model, batch = hugging_face_network(kind), images()
    found = gmarpp.explain(ImageFeatures(model), batch, gmarpp.METHODS, of_first_token)
    torch.testing.assert_close(found.scores, of_first_token(ImageFeatures(model)(batch)).detach(), rtol=1e-4, atol=1e-4)
    tower = model.vision_model
    direction = torch.linspace(-1, 1, found_width(model, batch))
    if kind == "CLIPModel":
        direction = direction @ model.visual_projection.weight
    expected = gmarpp.explain(tower, batch, gmarpp.METHODS, lambda output: output.pooler_output @ direction).maps
    assert all(relative_error(found.maps[method], expected[method]) < 1e-4 for method in expected)
    whole = gmarpp.explain(model, batch, gmarpp.METHODS, lambda output: of_first_token(output.image_embeds)).maps
    assert all(torch.equal(whole[method], found.maps[method]) for method in whole)
    with pytest.raises(ValueError, match=r"ImageEmbedding.* holds no logits .*gmarpp.targets \(Text"):
        gmarpp.explain(model, batch)


def found_width(model, batch):
    return ImageFeatures(model)(batch).shape[1]


class Patchify(nn.Module):
    """SigLIP 2 of variable resolution takes patches."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, batch):
        patches = batch.unfold(2, 8, 8).unfold(3, 8, 8).permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(1, 2)
        mask = torch.ones(len(batch), patches.shape[1], dtype=torch.long)
        return self.model(patches, mask, torch.tensor([[4, 4]] * len(batch))).pooler_output


def test_siglip_2_behind_a_module_that_makes_its_patches():
    torch.manual_seed(0)
    options = {name: value for name, value in SMALL.items() if name != "image_size"}
    config = transformers.Siglip2VisionConfig(**options, num_patches=16, attn_implementation="sdpa")
    tower = sharpened(transformers.Siglip2VisionModel(config))
    without_weights(tower)
    model, batch = Patchify(tower), images()
    head = lambda tokens: tower.head(tower.post_layernorm(tokens))  # noqa: E731
    blocks = tower.encoder.layers
    arguments = (model, batch, of_first_token, of_first_token, (4, 4), None, blocks, head)
    assert_equals_naive(*arguments, prefix=0, head_score=of_first_token)


def test_a_tower_without_logits_asks_for_a_score():
    with pytest.raises(ValueError, match=r"BaseModelOutputWithPooling.*last_hidden_state.*function of the output"):
        gmarpp.explain(hugging_face_network("ViTModel"), images())


def test_a_query_of_yolos_starts_at_its_token():
    options = {"image_size": [32, 32], "num_detection_tokens": 4}
    model, batch = hugging_face_network("YolosForObjectDetection", **options), images()
    score = lambda output: output.logits[:, 1, 0]  # noqa: E731
    found = gmarpp.explain(model, batch, ["attention", "legrad"], score).maps
    attentions, _ = attention_and_gradients(model, batch, score)
    expected = attentions[-1][:, :, 18, 1:17].mean(1).reshape(2, 4, 4)
    assert relative_error(found["attention"], expected) < 1e-5


def test_a_function_of_a_hugging_face_output_explains_by_every_method():
    model, batch = hugging_face_network("ViTForImageClassification"), images()
    found = gmarpp.explain(model, batch, gmarpp.METHODS, target=lambda output: output.logits[:, 3])
    expected = gmarpp.explain(model, batch, gmarpp.METHODS, target=3)
    for method in gmarpp.METHODS:
        assert relative_error(found.maps[method], expected.maps[method]) < 1e-5, method


def test_class_names_are_targets():
    model = hugging_face_network("ViTForImageClassification")
    model.config.label2id = {"tabby": 3, "espresso": 5}
    assert gmarpp.explain(model, images(), target="espresso").target.tolist() == [5, 5]
    assert gmarpp.explain(model, images(), target=["tabby", "espresso"]).target.tolist() == [3, 5]
    with pytest.raises(ValueError, match="unknown class 'tab': did you mean tabby"):
        gmarpp.explain(model, images(), target="tab")
    with pytest.raises(ValueError, match="carries no class names"):
        gmarpp.explain(timm_network("vit_tiny_patch16_224"), images(), target="tabby")
