"""The balanced gradient and its methods against an implementation of their own."""

import contextlib
import dataclasses
import gc
import itertools
import warnings

import naive_balanced
import open_clip
import pytest
import torch
import torch.nn.functional as F
from naive_balanced import (
    balanced_run,
    constants_held,
    held,
    hold_by_class,
    margin_of,
    naive_balanced_rollout,
    naive_token_relevance,
)
from test_explain import images, logit_of, relative_error, vit
from test_families import NETWORKS, shares, sharpened, timm_network
from torch import nn

import gmarpp
from gmarpp.attribution import Method, balanced
from gmarpp.attribution.descent import Descent
from gmarpp.attribution.relevance import Relevance
from gmarpp.attribution.stream import Entered
from gmarpp.network.output import logits_of

BOTH = ("token_relevance", "gmarpp_balanced")
TARGET = torch.tensor([1, 4, 2])
OTHERS = {
    "timm, residual post-norm": (
        lambda: timm_network("vit_base_patch16_rpn_224"), (32, 32), (4, 4), 0, range(16),
    ),
    "timm, root mean square norms by hand": (
        lambda: timm_network("vit_base_patch16_xp_224"), (32, 32), (4, 4), 1, [0],
    ),
    "timm, QuickGELU and a norm before the blocks": (
        lambda: timm_network("vit_base_patch16_clip_quickgelu_224"), (32, 32), (4, 4), 1, [0],
    ),
}  # fmt: skip


def assert_equals_the_reference(found, run, readout, prefix):
    batch, height, width = found["token_relevance"].shape
    expected = naive_token_relevance(run, prefix).view(batch, height, width)
    assert relative_error(found["token_relevance"], expected) < 1e-4
    for image in range(batch):
        expected = naive_balanced_rollout(run, readout, image)[prefix:].view(height, width)
        assert relative_error(found["gmarpp_balanced"][image], expected) < 1e-4


@pytest.mark.parametrize("name", NETWORKS | OTHERS)
def test_every_family_and_readout_equals_the_reference(name):
    make, size, grid, prefix, read = (NETWORKS | OTHERS)[name]
    model, batch = make(), images(2, size)
    target = torch.tensor([2, 5])
    layout = gmarpp.architecture_of(model)
    found = gmarpp.explain(model, batch, BOTH, target)
    assert torch.equal(found.logits, gmarpp.explain(model, batch, "gmarpp_l1", target).logits)
    assert torch.equal(found.scores, found.logits[[0, 1], target])
    score = lambda output: margin_of(target)(logits_of(output))  # noqa: E731
    run = balanced_run(model, batch, score, layout.blocks)
    assert_equals_the_reference(found.maps, run, shares(prefix + grid[0] * grid[1], read), prefix)


def reference(model, batch, target, score=None):
    return balanced_run(model, batch, score or margin_of(target), model.blocks)


@pytest.mark.parametrize("options", [{}, {"recompute": True}])
def test_methods_asked_for_alone_and_beside_others_are_the_same(options):
    model, batch = vit(), images()
    run = reference(model, batch, TARGET)
    together = gmarpp.explain(model, batch, gmarpp.METHODS + gmarpp.VARIANTS, TARGET, **options)
    assert_equals_the_reference(together.maps, run, shares(17, [0]), 1)
    for methods in ("token_relevance", "gmarpp_balanced", ("token_relevance", "random", "rollout", "legrad")):
        alone = gmarpp.explain(model, batch, methods, TARGET, **options).maps
        for name, maps in alone.items():
            torch.testing.assert_close(maps, together.maps[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"recompute": True}])
def test_plain_maps_are_those_of_calls_without_the_rule(options):
    for model in (vit(), timm_network("eva02_tiny_patch14_224", mlp_ratio=2)):
        batch = images()
        for target in (None, [[0, 3], [6, 1], [2, 2]]):
            expected = gmarpp.explain(model, batch, gmarpp.METHODS, target, **options)
            found = gmarpp.explain(model, batch, (*BOTH, *gmarpp.METHODS), target, **options)
            assert torch.equal(found.logits, expected.logits)
            assert torch.equal(found.scores, expected.scores)
            for name, maps in expected.maps.items():
                assert relative_error(found.maps[name], maps) < 1e-6, name


def test_several_classes_contrasts_and_functions():
    model, batch = vit(), images()
    target = torch.stack((TARGET, torch.tensor([0, 0, 6])), dim=1)
    found = gmarpp.explain(model, batch, (*BOTH, "gmarpp_l1"), target).maps
    for column in range(2):
        run = reference(model, batch, target[:, column])
        assert_equals_the_reference({name: found[name][:, column] for name in BOTH}, run, shares(17, [0]), 1)

    difference = lambda logits: logits[[0, 1, 2], TARGET] - logits[:, 3]  # noqa: E731
    run = reference(model, batch, None, difference)
    for target in (
        gmarpp.Contrast(TARGET, 3),
        difference,
        lambda logits: (logits[[0, 1, 2], TARGET] - logits[:, 3]).exp().log(),
    ):
        found = gmarpp.explain(model, batch, BOTH, target)
        assert_equals_the_reference(found.maps, run, shares(17, [0]), 1)
        torch.testing.assert_close(found.scores, run.score.float())


def test_the_logit_of_a_single_class_is_explained_as_it_is():
    model, batch = vit(num_classes=1), images()
    run = reference(model, batch, None, lambda logits: logits[:, 0])
    found = gmarpp.explain(model, batch, BOTH)
    assert_equals_the_reference(found.maps, run, shares(17, [0]), 1)


def test_an_attention_pool_hands_its_row_to_the_balanced_rollout():
    model, batch, target = timm_network("vit_base_patch16_siglip_224"), images(2), torch.tensor([2, 5])
    found = gmarpp.explain(model, batch, BOTH, target).maps
    run = balanced_run(model, batch, margin_of(target), model.blocks)
    pool, gradient = run.attentions[-1], run.gradients[-1]
    assert pool.shape == (2, 3, 1, 16)
    expected = naive_token_relevance(run, 0).view(2, 4, 4)
    assert relative_error(found["token_relevance"], expected) < 1e-4
    for image in range(2):
        start = (gradient[image, :, 0].clamp(min=0) * pool[image, :, 0]).sum(0)
        expected = naive_balanced_rollout(run, start / start.sum(), image).view(4, 4)
        assert relative_error(found["gmarpp_balanced"][image], expected) < 1e-4


@pytest.mark.parametrize("quick_gelu", [True, False])
def test_open_clip_explains_a_function_of_its_features(quick_gelu):
    torch.manual_seed(0)
    vision = {"image_size": 32, "patch_size": 8, "width": 48, "head_width": 16, "layers": 3}
    text = {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1}
    clip = sharpened(open_clip.CLIP(embed_dim=24, vision_cfg=vision, text_cfg=text, quick_gelu=quick_gelu))
    prompt = F.normalize(torch.randn(24), dim=0)
    score = lambda features: F.normalize(features, dim=-1) @ prompt  # noqa: E731
    batch = images(2)
    found = gmarpp.explain(clip.visual, batch, BOTH, target=score)
    run = balanced_run(clip.visual, batch, score, clip.visual.transformer.resblocks)
    assert_equals_the_reference(found.maps, run, shares(17, [0]), 1)


def shares_of_biases(model, batch, score):
    """Give what the biases above each block's input say for the score of all images together, lowest block first."""
    model.requires_grad_(True)
    hooks = hold_by_class(model)
    with constants_held(share=0):
        total = score(model(batch)).sum()
        biases = {name: each for name, each in model.named_parameters() if name.endswith("bias")}
        found = torch.autograd.grad(total, list(biases.values()))
    for hook in hooks:
        hook.remove()
    by_name = {name: (each * g).sum() for (name, each), g in zip(biases.items(), found, strict=True)}
    blocks = range(len(model.blocks))
    is_above = lambda name, block: "blocks." not in name or int(name.split(".")[1]) >= block  # noqa: E731
    embedding = ("patch_embed", "pos_embed", "cls_token")
    by_name = {name: share for name, share in by_name.items() if not name.startswith(embedding)}
    return [sum(share for name, share in by_name.items() if is_above(name, block)) for block in blocks]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vit_tiny_patch16_224", {}),
        ("vit_tiny_patch16_224", {"global_pool": "avg", "init_values": 0.5}),
        ("eva02_tiny_patch14_224", {"mlp_ratio": 2}),
        ("vit_base_patch16_rpn_224", {}),
        ("vit_base_patch16_siglip_224", {}),
    ],
)
def test_relevance_and_biases_add_up_to_the_score_in_every_layer(name, options, monkeypatch):
    monkeypatch.setattr(balanced, "QUERY_KEY_SHARE", 0.0)
    seen = []
    monkeypatch.setattr(Relevance, "receive", lambda self, relevance: seen.append(relevance.sum()))
    model, batch, score = vit(name, **options), images(), logit_of(TARGET)
    for parameter in model.parameters():
        if parameter.dim() == 1 and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.2)
    found = gmarpp.explain(model, batch, "token_relevance", score)
    total = found.scores.sum()
    for relevance, of_biases in zip(reversed(seen), shares_of_biases(model, batch, score), strict=True):
        assert abs(of_biases) > 1e-3 * abs(total)
        torch.testing.assert_close(relevance + of_biases, total, rtol=1e-4, atol=1e-4)


class WrittenOut(nn.Module):
    """A block with a norm and an activation of one's own."""

    def __init__(self, block, norm, activation):
        super().__init__()
        self.block, self.norm2 = block, nn.Identity()
        self.norm, self.activation = norm, activation

    def forward(self, tokens):
        weight, bias = self.block.norm2.weight, self.block.norm2.bias
        tokens = self.norm2(tokens + self.block.attn(self.norm(tokens, weight, bias)))
        return tokens + self.block.mlp.fc2(self.activation(self.block.mlp.fc1(self.norm(tokens, weight, bias))))


def written_out(norm, activation, **options):
    model = vit(depth=2, **options)
    model.blocks = nn.Sequential(*(WrittenOut(block, norm, activation) for block in model.blocks))
    for parameter in model.parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, 0.5, 0.3)
    return model


def layer_norm_by_hand(x, weight, bias):
    mean = x.mean(-1, keepdim=True)
    return weight * ((x - mean) / ((x - mean) * (x - mean)).mean(-1, keepdim=True).add(1e-5).sqrt()) + bias


def layer_norm_by_rsqrt(x, weight, bias):
    x = x - x.mean(-1, keepdim=True)
    return torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * x * weight + bias


def rms_norm_by_hand(x, weight, bias):
    x = x.float()
    return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)).to(x.dtype)


def rms_norm_by_norm(x, weight, bias):
    return x / (x.norm(dim=-1, keepdim=True) / x.shape[-1] ** 0.5).clamp_min(1e-6) * weight


def in_place(function):
    def call(x):
        x = x + 0
        assert function(x) is x
        return x

    return call


def centered(x, weight, bias):
    return naive_balanced.layer_norm(x, (48,), weight, bias)


def not_centered(x, weight, bias):
    return naive_balanced.rms_norm(x, (48,), weight, 1e-5)


# name: what the network calls, and the same with constants held
NORMS = {
    "by hand": (layer_norm_by_hand, centered),
    "by rsqrt": (layer_norm_by_rsqrt, centered),
    "function": (lambda x, w, b: F.layer_norm(x, (48,), w, b), centered),
    "keywords": (lambda x, w, b: F.layer_norm(x, normalized_shape=(48,), bias=b, weight=w, eps=1e-5), centered),
    "torch": (lambda x, w, b: torch.layer_norm(x, (48,), w, b, 1e-5, False), centered),
    "root mean square by hand": (rms_norm_by_hand, not_centered),
    "root mean square by norm": (rms_norm_by_norm, lambda x, w, b: naive_balanced.rms_norm(x, (48,), w, 0.0)),
    "root mean square function": (lambda x, w, b: F.rms_norm(x, (48,), w, 1e-5), not_centered),
}
ACTIVATIONS = {
    "gelu": (F.gelu, held(F.gelu)),
    "tanh gelu": (lambda x: F.gelu(x, approximate="tanh"), held(lambda x: F.gelu(x, approximate="tanh"))),
    "gelu by erf": (lambda x: x * 0.5 * (1.0 + torch.erf(x / 2**0.5)), held(F.gelu)),
    "gelu by tanh": (
        lambda x: 0.5 * x * (1.0 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * torch.pow(x, 3)))),
        held(lambda x: F.gelu(x, approximate="tanh")),
    ),
    "quick gelu": (lambda x: x * torch.sigmoid(1.702 * x), held(lambda x: x * torch.sigmoid(1.702 * x))),
    "swish in place by hand": (in_place(lambda x: x.mul_(x.sigmoid())), held(F.silu)),
    "silu": (F.silu, held(F.silu)),
    "silu in place": (in_place(lambda x: F.silu(x, inplace=True)), held(F.silu)),
    "relu": (torch.relu, held(F.relu)),
    "relu method": (lambda x: x.relu(), held(F.relu)),
    "relu in place": (in_place(F.relu_), held(F.relu)),
    "relu in place by position": (in_place(lambda x: F.relu(x, True)), held(F.relu)),
    "mish": (nn.Mish(), held(F.mish)),
    "hardswish": (nn.Hardswish(), held(F.hardswish)),
    "elu": (nn.ELU(1.0), held(F.elu)),
    "leaky relu": (nn.LeakyReLU(0.1), held(lambda x: F.leaky_relu(x, 0.1))),
    "tanh": (torch.tanh, held(torch.tanh)),
    "two": (lambda x: F.silu(F.relu(x)) + x, lambda x: held(F.silu)(held(F.relu)(x)) + x),
    "gated by half": (
        lambda x: F.gelu(x.chunk(2, -1)[0]).repeat(1, 1, 2) * x.chunk(2, -1)[1].repeat(1, 1, 2),
        lambda x: F.gelu(x.chunk(2, -1)[0]).repeat(1, 1, 2).detach() * x.chunk(2, -1)[1].repeat(1, 1, 2),
    ),
    "gated by sigmoid": (lambda x: x.sigmoid() * x.flip(-1), lambda x: x.sigmoid().detach() * x.flip(-1)),
}


@pytest.mark.parametrize(
    ("norm", "activation"),
    [(norm, "gelu") for norm in NORMS]
    + [("function", activation) for activation in ACTIVATIONS if activation != "gelu"],
)
def test_norms_and_activations_are_known_however_they_are_written(norm, activation):
    (norm, held_norm), (activation, held_activation) = NORMS[norm], ACTIVATIONS[activation]
    model, batch = written_out(norm, activation), images()
    expected, reference = model(batch), written_out(held_norm, held_activation)
    run = balanced_run(reference, batch, margin_of(TARGET), reference.blocks)
    for options in ({}, {"recompute": True}):
        found = gmarpp.explain(model, batch, BOTH, TARGET, **options)
        assert relative_error(found.logits, expected) < 1e-5
        assert_equals_the_reference(found.maps, run, shares(17, [0]), 1)


def square_of_view(x):
    x[..., 1:].mul_(x[..., :-1].clone())
    return x


def scripted():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.script(nn.GELU())


UNKNOWN = {
    "softplus": (F.softplus, "Softplus"),
    "squared relu": (lambda x: F.relu(x).pow(2), "Pow"),
    "sigmoid": (torch.sigmoid, "Sigmoid"),
    "reciprocal": (lambda x: 1 / (x * x + 1), "Reciprocal"),
    "square": (lambda x: x * x, r"Mul \(of two branches, neither of them activated\)"),
    "bilinear": (lambda x: x * x.flip(-1), "Mul"),
    "relu times relu": (lambda x: F.relu(x) * F.relu(x.flip(-1)), "Mul"),
    "glu": (lambda x: F.glu(x).repeat(1, 1, 2), "Glu"),
    "in a view": (square_of_view, "AsStrided"),
    "scripted": (scripted(), "Gelu"),
    "function of one's own": (lambda x: OwnFunction.apply(x), "OwnFunction"),
}


class OwnFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * x

    @staticmethod
    def backward(ctx, outer):
        return outer


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_the_rule_does_not_know_is_named(name):
    activation, named = UNKNOWN[name]
    model, batch = written_out(centered, activation), images()
    for methods in (*BOTH, ("gmarpp_l1", *BOTH)):
        with pytest.raises(gmarpp.UnsupportedNetworkError, match=rf"no rule for operations of this network: {named}"):
            gmarpp.explain(model, batch, methods, TARGET)
    assert gmarpp.explain(model, batch, "gmarpp_l1", TARGET).maps["gmarpp_l1"].isfinite().all()


class InOrder(nn.Module):
    """A block that adds in another way than most."""

    def __init__(self, block, kind):
        super().__init__()
        self.block, self.norm2, self.kind = block, nn.Identity(), kind

    def forward(self, x):
        block, attended = self.block, self.block.attn
        if self.kind == "post-norm":
            x = block.norm1(self.norm2(x + attended(x)))
            return block.norm2(x + block.mlp(x))
        if self.kind == "in place":
            x += attended(block.norm1(x.clone()))
            return x + block.mlp(block.norm2(x))
        if self.kind == "scaled":
            x = 0.5 * x + attended(block.norm1(x))
        elif self.kind == "twice":
            y = attended(block.norm1(x))
            return x + y + (x + y.tanh())
        else:
            x = attended(block.norm1(x))
        return x + block.mlp(block.norm2(x))


def in_order(kind):
    model = vit(depth=2)
    model.blocks = nn.Sequential(*(InOrder(block, kind) for block in model.blocks))
    return model


def test_blocks_with_norms_behind_the_additions_are_explained():
    model, batch = in_order("post-norm"), images()
    found = gmarpp.explain(model, batch, BOTH, TARGET).maps
    assert_equals_the_reference(found, reference(in_order("post-norm"), batch, TARGET), shares(17, [0]), 1)


def test_blocks_that_change_their_tokens_in_place_are_named():
    for methods in BOTH:
        with pytest.raises(gmarpp.UnsupportedNetworkError, match="block 1 changes the tokens it was given in place"):
            gmarpp.explain(in_order("in place"), images(), methods, TARGET)


@pytest.mark.parametrize(("kind", "places"), [("scaled", 0), ("none", 0), ("twice", 2)])
def test_a_residual_that_cannot_be_found_is_named(kind, places):
    model, batch = in_order(kind), images()
    with pytest.raises(gmarpp.UnsupportedNetworkError, match=f"to its tokens in one place, got {places}"):
        gmarpp.explain(model, batch, BOTH, TARGET)
    assert gmarpp.explain(model, batch, "token_relevance", TARGET).maps["token_relevance"].std() > 0


def test_networks_without_known_blocks_are_named():
    model, layout = vit(), gmarpp.Architecture(lambda height, width: (height // 8, width // 8), prefix_tokens=1)
    with pytest.raises(
        gmarpp.UnsupportedNetworkError, match="token_relevance, gmarpp_balanced: the network's blocks are"
    ):
        gmarpp.explain(model, images(), ("rollout", *BOTH), architecture=layout)


class OwnProduct(Method):
    """Signed gradient times attention of all layers, of a balanced gradient, by matrices."""

    name, label, gradient_rule = "own", "Own", "balanced"

    def start(self, readout, images, tokens):
        return readout.new_zeros(len(readout), tokens)

    def step(self, row, layer):
        return row + layer.product.sum((1, 2))


@pytest.mark.parametrize("known_blocks", [True, False])
def test_methods_of_ones_own_take_the_balanced_gradient(known_blocks):
    model, batch = vit(), images()
    layout = gmarpp.architecture_of(model)
    if not known_blocks:
        layout = dataclasses.replace(layout, blocks=(), head=None)
    found = gmarpp.explain(model, batch, OwnProduct(), TARGET, architecture=layout).maps["own"]
    run = reference(model, batch, TARGET)
    expected = sum((a * g).sum((1, 2)) for a, g in zip(run.attentions, run.gradients, strict=True))
    assert relative_error(found, expected[:, 1:].view(3, 4, 4)) < 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_and_half_weights_agree_with_float32(dtype):
    model, batch = vit(), images()
    expected = gmarpp.explain(model, batch, BOTH, TARGET).maps
    with torch.autocast("cpu", dtype):
        autocast = gmarpp.explain(model, batch, BOTH, TARGET)
        assert torch.equal(autocast.logits, gmarpp.explain(model, batch, "rollout", TARGET).logits)
    half = gmarpp.explain(model.to(dtype), batch.to(dtype), BOTH, TARGET).maps
    for name, found in itertools.product(BOTH, (autocast.maps, half)):
        assert found[name].dtype == torch.float32
        assert torch.corrcoef(torch.stack((found[name].flatten(), expected[name].flatten())))[0, 1] > 0.98


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("fails", [False, True])
def test_nothing_of_the_rule_remains(recompute, fails):
    def score(logits):
        if fails:
            raise ZeroDivisionError
        return logits[:, 0]

    functions = {name: getattr(F, name) for name in ("layer_norm", "gelu", "scaled_dot_product_attention")}
    model, batch = vit(), images()
    expected = model(batch)
    gc.collect()
    gc.disable()
    try:
        with pytest.raises(ZeroDivisionError) if fails else contextlib.nullcontext():
            gmarpp.explain(model, batch, (*BOTH, *gmarpp.METHODS), score, recompute=recompute)
        if fails:
            gc.collect()  # of the traceback, which holds its frames
        assert not [each for each in gc.get_objects() if type(each) in (Descent, Entered)]
    finally:
        gc.enable()
    assert functions == {name: getattr(F, name) for name in functions}
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    assert not any("forward" in vars(each) or any(getattr(each, name) for name in hooks) for each in model.modules())
    assert torch.equal(model(batch), expected)
