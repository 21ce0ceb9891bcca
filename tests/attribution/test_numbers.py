"""Maps are finite and right in every precision and grad mode, or an error names the images and the remedy."""

import functools

import open_clip
import pytest
import torch
import torch.nn.functional as F
from naive_attribution import attention_and_gradients, naive_row
from test_explain import images, logit_of, relative_error, vit
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.utils.checkpoint import checkpoint

import gmarpp

ALL = gmarpp.METHODS + gmarpp.VARIANTS
TARGET = torch.tensor([1, 4, 2])


def correlation(found, expected):
    return torch.corrcoef(torch.stack((found.flatten(), expected.flatten())))[0, 1]


@pytest.mark.parametrize("pool", ["token", "avg"])
@pytest.mark.parametrize("factor", [30, 2.0**-30])
@pytest.mark.parametrize("half", ["autocast", "network"])
def test_float16_finds_its_scale(pool, factor, half):
    model, batch = vit(global_pool=pool), images()
    with torch.no_grad():
        model.head.weight.mul_(max(1, factor))
        model.head.bias.zero_()
    # Little relevance beside a residual leaves constant maps, and random maps depend on the images' dtype.
    bare = gmarpp.attribution.GMARPlusPlus(alpha=0, name="bare")
    methods = [bare, "gmar_l1", "gmar_l2", "legrad"] if factor < 1 else [bare, *(set(ALL) - {"random"})]
    score = TARGET if factor > 1 else lambda logits: logit_of(TARGET)(logits.float()) * factor
    expected = gmarpp.explain(model, batch, methods, score).maps
    if half == "autocast":
        with torch.autocast("cpu", torch.float16):
            found = gmarpp.explain(model, batch, methods, score).maps
    else:
        found = gmarpp.explain(model.half(), batch.half(), methods, score).maps
    for name in expected:
        assert correlation(found[name], expected[name]) > 0.99, name
        # Relevance that has underflowed would leave the identity, and so maps of another size.
        assert relative_error(found[name], expected[name]) < 0.1, name


def test_float16_explains_a_hundredfold_similarity_to_a_prompt():
    torch.manual_seed(0)
    vision = {"image_size": 32, "patch_size": 8, "width": 48, "head_width": 16, "layers": 3}
    text = {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1}
    clip = open_clip.CLIP(embed_dim=24, vision_cfg=vision, text_cfg=text).eval()
    with torch.no_grad():
        clip.visual.proj.mul_(1e-3)  # Small features have large gradients once they are normalized.
    with torch.inference_mode():
        prompt = F.normalize(torch.randn(24), dim=0)
    usable = prompt.clone()
    score = lambda features: 100 * (F.normalize(features.float(), dim=-1) @ usable)  # noqa: E731
    expected = gmarpp.explain(clip.visual, images(), ALL, score).maps
    with torch.autocast("cpu", torch.float16):
        found = gmarpp.explain(clip.visual, images(), ALL, score).maps
    for name in ALL:
        assert relative_error(found[name], expected[name]) < 0.1, name
    with pytest.raises(ValueError, match=r"inference_mode.*clone\(\)"):
        gmarpp.explain(clip.visual, images(), ALL, lambda features: features @ prompt)


def test_gradients_that_are_not_finite_are_errors():
    model, batch = vit(), images()
    score = lambda logits: logits[:, 0] * 1e30 * 1e30  # noqa: E731
    with pytest.raises(ValueError, match=r"scores of images \[0, 1, 2\] are not finite"):
        gmarpp.explain(model, batch, "gmar_l1", score)
    # A finite score whose gradient is not: the derivative of the square root at 0.
    score = lambda logits: (logits[:, 0] - logits[:, 0].detach()).abs().sqrt()  # noqa: E731
    for name in ("gmarpp_l1", "gmar_l1", "legrad", "chefer"):
        with pytest.raises(ValueError, match=r"gradients of images \[0, 1, 2\] are not finite"):
            gmarpp.explain(model, batch, name, score)


@pytest.mark.parametrize("pool", ["token", "avg", "avgmax"])
def test_a_score_without_gradient_says_so_and_keeps_maps_that_need_none(pool):
    model, batch = vit(global_pool=pool), images()
    with torch.no_grad():
        model.head.weight[2] = 0
    for methods in ("gmarpp_l1", "gmar_l2", "chefer", "legrad", ["rollout", "gmarpp_l1"]):
        with pytest.raises(ValueError, match=r"score of images \[1, 2\] has a gradient of exactly zero"):
            gmarpp.explain(model, batch, methods, [0, 2, 2])
    found = gmarpp.explain(model, batch, ["rollout", "attention"], [0, 2, 2]).maps
    attentions, gradients = attention_and_gradients(model, batch, lambda logits: logits[:, 0])
    row = torch.zeros(17)
    row[0 if pool == "token" else slice(1, 17)] = 1
    for name, image in ((name, image) for name in found for image in range(3)):
        expected = naive_row(name, attentions, gradients, row / row.sum(), image)[1:].reshape(4, 4)
        assert relative_error(found[name][image], expected) < 1e-4, name


def targets():
    yield torch.tensor([1, 4, 2])
    yield torch.tensor([[1, 0], [4, 2], [2, 3]])
    yield gmarpp.Contrast(torch.tensor([1, 4, 2]), torch.tensor([0, 0, 0]))


@pytest.mark.parametrize("inside", [True, False])
def test_targets_made_in_inference_mode_are_targets(inside):
    model, batch = vit(), images()
    with torch.inference_mode():
        made = list(targets())
    for target, plain in zip(made, targets(), strict=True):
        with torch.inference_mode(inside):
            found = gmarpp.explain(model, batch, gmarpp.METHODS, target)
        expected = gmarpp.explain(model, batch, gmarpp.METHODS, plain)
        assert all(torch.equal(found.maps[name], expected.maps[name]) for name in gmarpp.METHODS)
        assert torch.equal(found.target, expected.target)


def test_a_network_made_in_inference_mode_is_explained_and_left_as_it_was():
    batch = images()
    expected = gmarpp.explain(vit(), batch, gmarpp.METHODS).maps
    with torch.inference_mode():
        model = vit()
    parameters = dict(model.named_parameters())
    found = gmarpp.explain(model, batch, gmarpp.METHODS).maps
    assert all(torch.equal(found[name], expected[name]) for name in gmarpp.METHODS)
    assert all(each is parameters[name] and each.requires_grad for name, each in model.named_parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_maps_do_not_depend_on_the_default_dtype(dtype):
    model, batch = vit(), images()
    methods = (*ALL, gmarpp.attribution.Rollout(alpha=0.3, name="weaker"))
    expected = gmarpp.explain(model, batch, methods).maps
    torch.set_default_dtype(dtype)
    try:
        found = gmarpp.explain(model, batch, methods).maps
    finally:
        torch.set_default_dtype(torch.float32)
    for name in expected:
        assert found[name].dtype == torch.float32
        assert torch.equal(found[name], expected[name]), name


@pytest.mark.parametrize("implementation", CheckpointImpl)
@pytest.mark.parametrize("wrapped", ["Block", "Mlp"])
def test_wrapped_activation_checkpointing_changes_nothing(implementation, wrapped):
    batch = images()
    expected = gmarpp.explain(vit(), batch, gmarpp.METHODS).maps
    model = vit()
    apply_activation_checkpointing(
        model,
        checkpoint_wrapper_fn=functools.partial(checkpoint_wrapper, checkpoint_impl=implementation),
        check_fn=lambda module: type(module).__name__ == wrapped,
    )
    for options in ({}, {"recompute": True}):
        found = gmarpp.explain(model, batch, gmarpp.METHODS, **options).maps
        for name in gmarpp.METHODS:
            torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-8)
    blocks = model.blocks[0] if wrapped == "Block" else model.blocks[0].mlp
    assert blocks.checkpoint_fn.func is checkpoint


class OwnCheckpoint(torch.nn.Module):
    def __init__(self, block, reentrant):
        super().__init__()
        self.block, self.reentrant = block, reentrant

    def forward(self, tokens):
        return checkpoint(self.block, tokens, use_reentrant=self.reentrant)


@pytest.mark.parametrize("reentrant", [True, False])
def test_blocks_that_checkpoint_themselves_are_explained(reentrant):
    model, batch = vit(), images()
    expected = gmarpp.explain(model, batch, gmarpp.METHODS).maps
    model.blocks = torch.nn.Sequential(*(OwnCheckpoint(block, reentrant) for block in model.blocks))
    found = gmarpp.explain(model, batch, gmarpp.METHODS).maps
    for name in gmarpp.METHODS:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-8)
    assert checkpoint is torch.utils.checkpoint.checkpoint


def test_inputs_of_the_blocks_may_require_gradients():
    model, batch = vit(), images()
    expected = gmarpp.explain(model, batch, gmarpp.METHODS).maps
    model.patch_embed.register_forward_hook(lambda _, args, output: output.requires_grad_())
    for options in ({}, {"recompute": True}):
        found = gmarpp.explain(model, batch, gmarpp.METHODS, **options).maps
        for name in gmarpp.METHODS:
            torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-8)


class FrozenBelow(torch.nn.Module):
    """Blocks below a certain one run without gradients, as they do when they are not trained."""

    def __init__(self, start):
        super().__init__()
        self.vit, self.start = vit(), start

    def forward(self, batch):
        with torch.no_grad():
            tokens = self.vit._pos_embed(self.vit.patch_embed(batch))
            for block in self.vit.blocks[: self.start]:
                tokens = block(tokens)
        for block in self.vit.blocks[self.start :]:
            tokens = block(tokens)
        return self.vit.forward_head(self.vit.norm(tokens))


@pytest.mark.parametrize("blocks", [True, False])
def test_a_cut_gradient_is_named_where_it_is_needed(blocks):
    batch, layout = images(), gmarpp.Architecture(lambda height, width: (height // 8, width // 8), prefix_tokens=1)
    expected = gmarpp.explain(vit(), batch, gmarpp.METHODS, TARGET).maps
    model = FrozenBelow(2)
    layout = gmarpp.architecture_of(model.vit) if blocks else layout
    found = gmarpp.explain(model, batch, ["rollout", "attention"], TARGET, architecture=layout).maps
    for name in found:
        assert relative_error(found[name], expected[name]) < 1e-5
    with pytest.raises(gmarpp.UnsupportedNetworkError, match=r"no gradient passes from attention layer 2 to the one"):
        gmarpp.explain(model, batch, "gmarpp_l1", TARGET, architecture=layout)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_a_quantized_network_is_named():
    model = torch.ao.quantization.quantize_dynamic(vit(), {torch.nn.Linear}, torch.qint8)
    for methods in ("gmarpp_l1", "legrad", "rollout"):
        with pytest.raises(gmarpp.UnsupportedNetworkError, match="quantized"):
            gmarpp.explain(model, images(), methods)
