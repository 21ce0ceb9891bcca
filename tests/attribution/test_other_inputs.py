"""Further arguments of forward, and inputs that are no images: videos, spectrograms."""

import itertools

import numpy as np
import pytest
import torch
import transformers
from naive_attribution import attention_and_gradients, naive_legrad, naive_row
from small_networks import vit
from test_families import PRODUCTS, images, relative_error, shares, sharpened
from torch import nn

import gmarpp
from gmarpp.network.extent import grid_extent

SMALL = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 3, "intermediate_size": 96}


class Prompted(nn.Module):
    """Logits of images, weighted by a vector per image, a table for all and a number."""

    def __init__(self):
        super().__init__()
        self.vit = vit()

    def forward(self, batch, prompt, table, scale=1.0):
        return self.vit(batch) * prompt @ table * scale


@pytest.fixture(scope="module")
def prompted():
    generator = torch.Generator().manual_seed(2)
    inputs = {"prompt": torch.randn(3, 5, generator=generator), "table": torch.randn(5, 4, generator=generator)}
    return Prompted(), images(batch=3), inputs | {"scale": 2.0}


METHODS = (*gmarpp.METHODS, *gmarpp.VARIANTS)


def test_each_image_is_explained_with_its_own_arguments(prompted):
    model, batch, inputs = prompted
    found = gmarpp.explain(model, batch, METHODS, [0, 1, 2], inputs=inputs)
    weights = inputs["prompt"][:, :, None] * inputs["table"] * 2
    for image in range(3):
        score = lambda logits: logits @ weights[image][:, image]  # noqa: B023, E731
        alone = gmarpp.explain(model.vit, batch[[image]], gmarpp.METHODS, score)
        torch.testing.assert_close(found.scores[[image]], alone.scores, rtol=1e-4, atol=1e-4)
        assert all(relative_error(found.maps[name][[image]], alone.maps[name]) < 1e-4 for name in gmarpp.METHODS)


def test_perturbed_images_keep_their_own_arguments(prompted):
    model, batch, inputs = prompted
    maps = torch.rand(3, 4, 4)
    found = gmarpp.perturbation_curves(model, batch, maps, None, 4, score="logit", batch_size=2, inputs=inputs)
    logits = model(batch, **inputs).detach()
    torch.testing.assert_close(found.deletion[:, 0], logits.amax(1), rtol=1e-4, atol=1e-4)
    for image in range(3):
        own = inputs | {"prompt": inputs["prompt"][[image]]}
        target = logits[image].argmax().item()
        alone = gmarpp.perturbation_curves(
            model, batch[[image]], maps[[image]], target, 4, score="logit", inputs=own
        ).deletion
        torch.testing.assert_close(found.deletion[[image]], alone, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="'drop' runs a network on its tokens, without inputs"):
        gmarpp.perturbation_curves(model, batch, maps, 0, 4, "drop", inputs=inputs)


def test_arguments_of_inference_mode(prompted):
    model, batch, inputs = prompted
    with torch.inference_mode():
        copied = inputs | {"prompt": inputs["prompt"].clone()}
        found = gmarpp.explain(model, batch.clone(), "gmarpp_l1", 0, inputs=copied).maps["gmarpp_l1"]
    assert torch.equal(found, gmarpp.explain(model, batch, "gmarpp_l1", 0, inputs=inputs).maps["gmarpp_l1"])


@pytest.mark.parametrize(
    ("inputs", "methods", "message"),
    [
        ({"prompt": 1.0}, "rollout", "Prompted cannot be called with the images, prompt: missing .* 'table'"),
        ({"prompt": 1.0, "table": 1.0, "temperature": 1.0}, "rollout", "unexpected keyword argument 'temperature'"),
        ({"prompt": [torch.ones(5)], "table": 1.0}, "rollout", "prompt: expected a tensor .* got tensors in a list"),
        (
            {"prompt": 1.0, "table": torch.ones(5, 4)},
            gmarpp.FunctionMethod("zeros", lambda model, batch, target: batch * 0),
            "inputs: zeros run the network on images alone",
        ),
    ],
)
def test_arguments_that_cannot_be_used(prompted, inputs, methods, message):
    with pytest.raises(ValueError, match=message):
        gmarpp.explain(prompted[0], prompted[1], methods, inputs=inputs)


def test_positions_are_interpolated_where_asked_for():
    torch.manual_seed(0)
    config = transformers.ViTConfig(**SMALL, image_size=32, patch_size=8, attn_implementation="sdpa", num_labels=7)
    model, batch = sharpened(transformers.ViTForImageClassification(config)), images(size=(40, 48))
    found = gmarpp.explain(model, batch, ["gmarpp_l1", "legrad"], 3, inputs={"interpolate_pos_encoding": True})
    assert found.maps["legrad"].shape == (2, 5, 6)
    torch.testing.assert_close(found.logits, model(batch, interpolate_pos_encoding=True).logits.detach())


def video_network(kind, **options):
    torch.manual_seed(0)
    network = getattr(transformers, kind)
    config = network.config_class(
        **SMALL, image_size=32, num_frames=6, num_labels=7, attn_implementation="sdpa", **options
    )
    return sharpened(network(config))


# kind: options, prefix tokens, tokens that the head reads, blocks, logits of the last tokens
VIDEO = {
    "VideoMAEForVideoClassification": (
        {"patch_size": 8, "tubelet_size": 2}, 0, range(48), lambda m: m.videomae.encoder.layer,
        lambda m, x: m.classifier(m.fc_norm(x.mean(1))),
    ),
    "VivitForVideoClassification": (
        {"tubelet_size": [2, 8, 8]}, 1, [0], lambda m: m.vivit.layers,
        lambda m, x: m.classifier(m.vivit.layernorm(x)[:, 0]),
    ),
}  # fmt: skip


def clips():
    return torch.randn(2, 6, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", VIDEO)
def test_videos_equal_the_naive_reference(kind):
    options, prefix, read, blocks, head = VIDEO[kind]
    model, batch, target = video_network(kind, **options), clips(), torch.tensor([2, 5])
    found = gmarpp.explain(model, batch, METHODS, target)
    assert all(maps.shape == (2, 3, 4, 4) for maps in found.maps.values())
    assert found.images.shape == (2, 6, 3, 32, 32)
    score = lambda output: getattr(output, "logits", output).gather(1, target[:, None])[:, 0]  # noqa: E731
    attentions, gradients = attention_and_gradients(model, batch, score)
    for method, image in itertools.product(PRODUCTS, range(2)):
        row = naive_row(method, attentions, gradients, shares(prefix + 48, read), image)
        assert relative_error(found.maps[method][image], row[prefix:].reshape(3, 4, 4)) < 1e-4, method
    expected = naive_legrad(model, batch, blocks(model), lambda tokens: head(model, tokens), score)
    assert relative_error(found.maps["legrad"], expected[:, prefix:].reshape(2, 3, 4, 4)) < 1e-4
    pairs = gmarpp.explain(model, batch, "gmarpp_l1", [[2, 5], [2, 5]]).maps["gmarpp_l1"]
    assert pairs.shape == (2, 2, 3, 4, 4)
    assert relative_error(pairs[0, 0], found.maps["gmarpp_l1"][0]) < 1e-5
    changed = batch.clone()
    changed[:, 4, :, 8:16, 24:] += 1
    assert changed_token(model, blocks(model), batch, changed) == prefix + (2 * 4 + 1) * 4 + 3


@torch.no_grad()
def changed_token(model, blocks, batch, changed):
    entered = []
    hook = blocks[0].register_forward_pre_hook(lambda module, args: entered.append(args[0]))
    model(batch), model(changed)
    hook.remove()
    return (entered[1] - entered[0]).abs().sum((0, 2)).argmax().item()


def test_a_spectrogram_is_mapped_by_frequency_and_time():
    torch.manual_seed(0)
    config = transformers.ASTConfig(
        **SMALL, patch_size=8, frequency_stride=6, time_stride=5, num_mel_bins=26, max_length=48, num_labels=7,
        attn_implementation="sdpa",
    )  # fmt: skip
    model = sharpened(transformers.ASTForAudioClassification(config))
    batch = torch.randn(2, 48, 26)
    found = gmarpp.explain(model, batch, METHODS, 4)
    assert all(maps.shape == (2, 4, 9) for maps in found.maps.values())
    score = lambda output: output.logits[:, 4]  # noqa: E731
    attentions, gradients = attention_and_gradients(model, batch, score)
    row = naive_row("gmarpp_l1", attentions, gradients, shares(38, [0, 1]), 0)
    assert relative_error(found.maps["gmarpp_l1"][0], row[2:].reshape(4, 9)) < 1e-4
    changed = batch.clone()
    changed[:, 25:28, 18:24] += 5  # in patches 4 and 5 of time, mostly in 5; in 2 and 3 of frequency, mostly in 3
    blocks = model.audio_spectrogram_transformer.layers
    assert divmod(changed_token(model, blocks, batch, changed) - 2, 9) in ((3, 4), (3, 5))
    # Patches overlap: the grid lies over as many strides.
    assert grid_extent(gmarpp.architecture_of(model), 26, 48) == (24, 45)
    assert found.images.shape == (2, 3, 24, 45)


def test_a_described_network_of_spectrograms_and_channels():
    model = vit(in_chans=1, img_size=(16, 40))
    found = gmarpp.explain(model, torch.randn(2, 1, 16, 40), ["gmarpp_l1", "legrad"])
    assert found.maps["legrad"].shape == (2, 2, 5)


def test_what_is_no_image_is_refused_by_networks_of_images():
    for given in (torch.randn(2, 4, 3, 32, 32), torch.randn(2, 32, 32)):
        with pytest.raises(ValueError, match=r"expected shape \(images, channels, height, width\), got .*`pictures`"):
            gmarpp.explain(vit(), given)


def test_videos_are_drawn_frame_by_frame():
    found = gmarpp.explain(video_network("VivitForVideoClassification", tubelet_size=[1, 8, 8]), clips(), "gmarpp_l1")
    found.maps["gmarpp_l1"] = torch.zeros(2, 6, 4, 4)
    plain = np.asarray(found.overlay(0))
    assert plain.shape == (64, 128, 3)  # four frames across, in two rows
    found.maps["gmarpp_l1"][0, 4, 1, 3] = 1
    changed = (np.asarray(found.overlay(0)) != plain).any(axis=2)
    assert changed[32:, :32].any()
    assert not changed[:32].any()
    assert not changed[:, 32:].any()  # although the cell lies beside the next frame
    luma = (torch.tensor([0.299, 0.587, 0.114]) @ found.images[0, 4].flatten(1)).numpy()
    assert np.corrcoef(luma, plain[32:, :32, 0].flatten())[0, 1] > 0.99
    assert found.show(images=1).get_size_inches()[0] > 2
