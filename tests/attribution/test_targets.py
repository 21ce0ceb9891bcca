"""Texts, regions and queries: scores by hand, maps by the naive reference, curves by runs of the network."""

import itertools

import open_clip
import pytest
import torch
import torch.nn.functional as F
import transformers
from naive_attribution import attention_and_gradients, naive_row
from small_networks import vit
from test_families import PRODUCTS, images, relative_error, shares, sharpened
from test_transformers import hugging_face_network
from torch import nn

import gmarpp
from gmarpp.targets import Query, Region, Text

VISION = {
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "intermediate_size": 96,
    "image_size": 32,
    "patch_size": 8,
}
TEXT = {
    "hidden_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 3,
    "intermediate_size": 96,
    "vocab_size": 99,
    "max_position_embeddings": 12,
    "bos_token_id": 97,
    "eos_token_id": 98,
    "pad_token_id": 0,
}
TEXTS = ("a cat", "three dogs by the sea")


def tokenizer(text, return_tensors, padding, max_length=None):
    """A word is a number below 97; texts begin and end as the network is told."""
    assert return_tensors == "pt"
    rows = [[97, *(sum(map(ord, word)) % 96 + 1 for word in each.split()), 98] for each in text]
    length = max_length if padding == "max_length" else max(map(len, rows))
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
    return {
        "input_ids": torch.tensor([row + [0] * (length - len(row)) for row in rows]),
        "attention_mask": mask,
    }


def network_of_texts(kind):
    torch.manual_seed(0)
    network = getattr(transformers, kind)
    options = {"projection_dim": 40} if kind == "CLIPModel" else {}
    config = network.config_class(vision_config=VISION, text_config=TEXT, attn_implementation="sdpa", **options)
    model = sharpened(network(config))
    if kind == "SiglipModel":
        nn.init.constant_(model.logit_bias, -3)
    return model


@pytest.fixture(scope="module")
def clip():
    return network_of_texts("CLIPModel")


@pytest.mark.parametrize("kind", ["CLIPModel", "SiglipModel"])
def test_texts_are_scored_as_the_network_scores_them(kind):
    model, batch = network_of_texts(kind), images()
    padding = "max_length" if kind == "SiglipModel" else True
    tokens = tokenizer(TEXTS, "pt", padding, 12)
    tokens = tokens if kind == "CLIPModel" else {"input_ids": tokens["input_ids"]}
    with torch.no_grad():
        expected = model(pixel_values=batch, **tokens).logits_per_image
    takes = tokenizer if kind == "CLIPModel" else lambda **options: {"input_ids": tokenizer(**options)["input_ids"]}
    with torch.inference_mode():
        both = Text(model, takes, TEXTS)
    found = gmarpp.explain(model, batch, ["gmarpp_l1", "legrad", "gmarpp_balanced"], both)
    torch.testing.assert_close(found.scores, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(found.logits, found.scores)
    assert found.target.tolist() == [[-1, -1], [-1, -1]]
    assert found.class_names == TEXTS
    for position, text in enumerate(TEXTS):
        one = gmarpp.explain(model, batch, list(found.maps), Text(model, takes, text))
        torch.testing.assert_close(one.scores, expected[:, position], rtol=1e-4, atol=1e-4)
        for name, maps in one.maps.items():
            assert relative_error(found.maps[name][:, position], maps) < 1e-4
    assert relative_error(found.maps["gmarpp_l1"][:, 0], found.maps["gmarpp_l1"][:, 1]) > 0.01


def test_maps_of_a_text_equal_the_naive_reference(clip):
    batch, tower = images(), clip.vision_model
    with torch.no_grad():
        text = F.normalize(clip.get_text_features(**tokenizer(TEXTS[:1], "pt", True)).pooler_output[0], dim=0)
        scale = clip.logit_scale.exp()
    score = lambda out: F.normalize(clip.visual_projection(out.pooler_output), dim=1) @ text * scale  # noqa: E731
    attentions, gradients = attention_and_gradients(tower, batch, score)
    target = Text(clip, tokenizer, TEXTS[0])
    found = gmarpp.explain(clip, batch, gmarpp.METHODS, target).maps
    for method, image in itertools.product(set(PRODUCTS) & set(found), range(2)):
        row = naive_row(method, attentions, gradients, shares(17, [0]), image)[1:].reshape(4, 4)
        assert relative_error(found[method][image], row) < 1e-4, method
    alone = gmarpp.explain(tower, batch, gmarpp.METHODS, score).maps
    assert all(relative_error(found[method], alone[method]) < 1e-4 for method in found)
    with_projection = transformers.CLIPVisionModelWithProjection(tower.config).eval()
    with_projection.vision_model.load_state_dict(tower.state_dict())
    with_projection.visual_projection = clip.visual_projection
    of_tower = gmarpp.explain(with_projection, batch, gmarpp.METHODS, target).maps
    assert all(relative_error(found[method], of_tower[method]) < 1e-5 for method in found)


def test_a_text_against_another(clip):
    batch, (cat, dogs) = images(), (Text(clip, tokenizer, text) for text in TEXTS)
    found = gmarpp.explain(clip, batch, "chefer", gmarpp.Contrast(cat, dogs))
    scores = gmarpp.explain(clip, batch, "chefer", Text(clip, tokenizer, TEXTS)).scores
    torch.testing.assert_close(found.scores, scores[:, 0] - scores[:, 1], rtol=1e-4, atol=1e-4)
    output = lambda output: cat(output) - dogs(output)  # noqa: E731
    assert torch.equal(found.maps["chefer"], gmarpp.explain(clip, batch, "chefer", output).maps["chefer"])
    assert found.class_names == ()  # although transformers calls two classes LABEL_0 and LABEL_1
    maps = torch.rand(2, 4, 4)
    curves = gmarpp.perturbation_curves(clip, batch, maps, gmarpp.Contrast(cat, dogs), 3, batch_size=3)
    either = [gmarpp.perturbation_curves(clip, batch, maps, each, 3, batch_size=3) for each in (cat, dogs)]
    torch.testing.assert_close(curves.deletion, either[0].deletion - either[1].deletion, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(curves.deletion[:, 0], found.scores, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=r"one class or score per image on either side.*\(2, 2\)"):
        gmarpp.explain(clip, batch, "chefer", gmarpp.Contrast(cat, Text(clip, tokenizer, TEXTS)))
    with pytest.raises(ValueError, match=r"one score per image, shape \(.*score each of several alone"):
        gmarpp.perturbation_curves(clip, batch, maps, Text(clip, tokenizer, TEXTS))


def test_texts_of_open_clip():
    torch.manual_seed(0)
    vision = {"image_size": 32, "patch_size": 8, "width": 48, "head_width": 16, "layers": 3}
    text = {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1}
    model, batch = sharpened(open_clip.CLIP(embed_dim=24, vision_cfg=vision, text_cfg=text)), images()
    tokens = torch.randint(1, 64, (2, 8))
    target = Text(model, lambda texts: tokens[: len(texts)], TEXTS)
    with torch.no_grad():
        image, words, scale = model(batch, tokens)
    for network in (model, model.visual):
        found = gmarpp.explain(network, batch, ["rollout", "gmarpp_l1"], target)
        torch.testing.assert_close(found.scores, scale * image @ words.T, rtol=1e-4, atol=1e-4)
    expected = gmarpp.explain(
        model.visual, batch, "gmarpp_l1", lambda out: scale * F.normalize(out, dim=1) @ words[1]
    ).maps
    assert relative_error(found.maps["gmarpp_l1"][:, 1], expected["gmarpp_l1"]) < 1e-4
    own = open_clip.SimpleTokenizer(context_length=8)
    with pytest.raises(ValueError, match="at most 8 tokens, got 9: shorten them"):
        Text(model, own, "one two three four five six seven")


def test_texts_that_cannot_be_compared(clip):
    batch, target = images(), Text(clip, tokenizer, "a cat")
    refused = [
        (lambda: Text(vit(), tokenizer, "a cat"), "expected a network of images and texts.*got VisionTransformer"),
        (lambda: Text(clip.vision_model, tokenizer, "a cat"), "got CLIPVisionModel: give the whole network"),
        (lambda: Text(clip, tokenizer, []), "at least one text, got none"),
        (lambda: Text(clip, tokenizer, "word " * 20), "at most 12 tokens, got 22"),
        # The tower's own vectors are as long as the embeddings of other networks.
        (
            lambda: gmarpp.explain(clip.vision_model, batch, target=target),
            "got BaseModelOutputWithPooling: explain the",
        ),
        (
            lambda: gmarpp.explain(vit(), batch, target=target),
            r"of shape \(images, 40\), got \(2, 5\): give the text's own",
        ),
        (
            lambda: gmarpp.explain(clip, batch, target=target, inputs={"input_ids": 1}),
            "unexpected keyword argument 'in",
        ),
    ]
    for refuse, message in refused:
        with pytest.raises(ValueError, match=message):
            refuse()


def test_columns_of_a_function_are_explained_one_by_one():
    model, batch = vit(), images()
    found = gmarpp.explain(model, batch, gmarpp.METHODS, lambda logits: logits[:, [1, 4]])
    expected = gmarpp.explain(model, batch, gmarpp.METHODS, [[1, 4], [1, 4]])
    assert all(relative_error(found.maps[name], expected.maps[name]) < 1e-5 for name in found.maps)
    torch.testing.assert_close(found.scores, expected.scores)
    assert found.show().axes


def test_texts_are_drawn_with_their_scores(clip):
    found = gmarpp.explain(clip, images(), "gmarpp_l1", Text(clip, tokenizer, TEXTS))
    written = [text.get_text() for text in found.show(images=1).axes[0].texts]
    for score, word in zip(found.scores[0], ("cat", "dogs"), strict=True):
        assert any(word in text for text in written)
        assert any(f"{score:.3g}" in text for text in written)


class Segmenter(nn.Module):
    """A class per patch, upsampled to half the image's size, or one value per place."""

    def __init__(self, classes=5):
        super().__init__()
        torch.manual_seed(0)
        self.vit, self.last = (
            sharpened(vit(num_classes=0, class_token=False, global_pool="")),
            nn.Conv2d(32, classes, 1),
        )
        self.eval()

    def forward(self, batch):
        values = self.last(self.vit(batch).mT.unflatten(2, (4, 4)))
        values = F.interpolate(values, scale_factor=4, mode="bilinear")
        return values if values.shape[1] > 1 else {"predicted_depth": values[:, 0]}


def by_hand(dense, masks):
    """The mean over a mask, pixel by pixel, of values (B, h, w) brought to the mask's size."""
    dense = F.interpolate(dense[:, None], masks.shape[1:], mode="bilinear")[:, 0]
    return torch.stack([image[mask].mean() for image, mask in zip(dense, masks, strict=True)])


MASKS = torch.zeros(2, 32, 32, dtype=torch.bool)
MASKS[0, 3:12, 20:], MASKS[1, 17, 5] = True, True


@pytest.mark.parametrize("classes", [torch.tensor([3, 1]), 3])
def test_a_class_over_a_region(classes):
    model, batch = Segmenter(), images()
    at = classes if isinstance(classes, torch.Tensor) else torch.tensor([classes] * 2)
    score = lambda output: by_hand(output[[0, 1], at], MASKS)  # noqa: E731
    found = gmarpp.explain(model, batch, gmarpp.METHODS, Region(MASKS, classes))
    torch.testing.assert_close(found.scores, score(model(batch)).detach(), rtol=1e-4, atol=1e-5)
    attentions, gradients = attention_and_gradients(model, batch, score)
    alone = gmarpp.explain(model, batch, gmarpp.METHODS, score).maps
    assert all(relative_error(found.maps[name], alone[name]) < 1e-4 for name in alone)
    # What the mask's pixels are interpolated from: rows 0 to 2 and columns 1 to 3; rows 1 and 2 and columns 0 and 1.
    touched = [[1, 2, 3, 5, 6, 7, 9, 10, 11], [4, 5, 8, 9]]
    for method, image in itertools.product(("gmarpp_l1", "rollout", "chefer"), range(2)):
        row = naive_row(method, attentions, gradients, shares(16, touched[image]), image).reshape(4, 4)
        assert relative_error(found.maps[method][image], row) < 1e-4, method


def test_a_box_is_its_pixels():
    model, batch = Segmenter(), images()
    mask = torch.zeros(32, 32, dtype=torch.bool)
    mask[4:9, 10:31] = True
    for box in ([10, 4, 31, 9], [9.6, 3.7, 30.9, 9.4]):
        found = Region(box, 2, size=(32, 32))(model(batch))
        torch.testing.assert_close(found, Region(mask, 2)(model(batch)))
    boxes = Region(torch.tensor([[20.0, 3, 32, 12], [5, 17, 6, 18]]), 2, size=(32, 32))
    torch.testing.assert_close(boxes(model(batch)), Region(MASKS, 2)(model(batch)))


def test_regions_in_other_forms_of_output():
    model, batch = Segmenter(1), images()
    expected = by_hand(model(batch)["predicted_depth"], MASKS)
    torch.testing.assert_close(gmarpp.explain(model, batch, "rollout", Region(MASKS, None)).scores, expected.detach())
    dense = Segmenter()(batch)
    output = transformers.modeling_outputs.SemanticSegmenterOutput(logits=dense)
    for each in (output, {"out": dense}, dense):
        assert torch.equal(Region(MASKS, 4)(each), Region(MASKS, 4)(dense))


def test_curves_of_a_region_take_each_image_with_its_own_mask():
    """Also where images are scored in other batches than they came in."""
    model, batch = Segmenter(), images()
    maps = torch.rand(2, 4, 4, generator=torch.Generator().manual_seed(3))
    score = lambda output: by_hand(output[[0, 1], [3, 1]], MASKS)  # noqa: E731
    expected = gmarpp.perturbation_curves(model, batch, maps, score, 4)
    found = gmarpp.perturbation_curves(model, batch, maps, Region(MASKS, torch.tensor([3, 1])), 4, batch_size=3)
    torch.testing.assert_close(found.deletion, expected.deletion, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.insertion, expected.insertion, rtol=1e-4, atol=1e-5)


def test_a_query_is_explained_from_its_token():
    model = hugging_face_network("YolosForObjectDetection", image_size=[32, 32], num_detection_tokens=4)
    batch, queries, classes = images(), torch.tensor([1, 3]), torch.tensor([0, 2])
    score = lambda output: output.logits[[0, 1], queries, classes]  # noqa: E731
    found = gmarpp.explain(model, batch, gmarpp.METHODS, Query(queries, classes))
    torch.testing.assert_close(found.scores, score(model(batch)).detach())
    attentions, gradients = attention_and_gradients(model, batch, score)
    for method, image in itertools.product(("gmarpp_l1", "rollout", "chefer", "attention"), range(2)):
        row = naive_row(method, attentions, gradients, shares(21, [17 + queries[image].item()]), image)
        assert relative_error(found.maps[method][image], row[1:17].reshape(4, 4)) < 1e-4, method
    assert torch.equal(Query(2, 1)({"pred_logits": model(batch).logits}), model(batch).logits[:, 2, 1])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: Region(torch.ones(8, 8), 1),
            r"expected a boolean mask, or a box .* got torch.float32 of shape \(8, 8\)",
        ),
        (lambda: Region([1, 2, 3, 4], 1), r"expected size=\(height, width\)"),
        (lambda: Region([5, 2, 3, 4], 1, (8, 8)), "at least one pixel in every mask"),
        (lambda: Region(torch.ones(1, 2, 8, 8).bool(), 1), r"a mask of shape \(H, W\) or \(images, H, W\)"),
        (lambda: Region(MASKS, torch.tensor([1, 2, 3])), "entries for one number of images, got 2 and 3"),
        (lambda: Region(MASKS, "cat"), r"Region: target: expected an index, got 'cat': .*config.label2id"),
        (lambda: Region(MASKS, 1.5), "expected an index, or one per image, got torch.float32"),
        (lambda: Region(MASKS, 5)(torch.zeros(2, 5, 8, 8)), "Region: target: expected 0 to 4, got 5 to 5"),
        (
            lambda: Region(MASKS, None)(torch.zeros(2, 5, 8, 8)),
            r"expected a class for an output of shape \(2, 5, 8, 8\)",
        ),
        (lambda: Region(MASKS, 1)(torch.zeros(2, 8, 8)), r"expected None for an output of shape \(2, 8, 8\)"),
        (lambda: Region(MASKS, 1)(torch.zeros(2, 8)), r"output of shape \(images, classes, h, w\).*got shape \(2, 8\)"),
        (lambda: Region(MASKS, 1)({"loss": 1}), r"output of shape \(images, classes, h, w\).*got dict"),
        (lambda: Query(4, 1)(torch.zeros(2, 4, 3)), "Query: index: expected 0 to 3, got 4 to 4"),
        (lambda: Query(0, -1)(torch.zeros(2, 4, 3)), "Query: target: expected 0 to 2, got -1 to -1"),
        (lambda: Query(0, 1)(torch.zeros(2, 4)), r"logits of shape \(images, queries, classes\), got shape \(2, 4\)"),
    ],
)
def test_regions_and_queries_that_cannot_be_scored(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_another_number_of_images_than_masks():
    for call in (
        lambda batch, target: gmarpp.explain(Segmenter(), batch, target=target),
        lambda batch, target: gmarpp.perturbation_curves(Segmenter(), batch, torch.rand(3, 4, 4), target),
    ):
        with pytest.raises(ValueError, match="Region: expected 2 images, as it has masks or indices, got 3"):
            call(images(batch=3), Region(MASKS, 1))
