"""How the rule of the balanced gradient is applied to norms, activations and products, however they are written."""

import warnings

import naive_balanced
import pytest
import torch
import torch.nn.functional as F
from naive_balanced import balanced_run, held, margin_of
from test_balanced import BOTH, TARGET, assert_equals_the_reference
from test_explain import images, relative_error, vit
from test_families import shares
from torch import nn

import gmarpp


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
    "root mean square by normalize": (
        lambda x, w, b: F.normalize(x, dim=-1, eps=1e-6) * (48**0.5 * w),
        lambda x, w, b: naive_balanced.rms_norm(x, (48,), w, 0.0),
    ),
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
    "relu6": (nn.ReLU6(), held(F.relu6)),
    "zeros": (lambda x: F.silu(x.masked_fill(x < 0, 0)), lambda x: held(F.silu)(x.masked_fill(x < 0, 0))),
    "elu": (nn.ELU(1.0), held(F.elu)),
    "leaky relu": (nn.LeakyReLU(0.1), held(lambda x: F.leaky_relu(x, 0.1))),
    "tanh": (torch.tanh, held(torch.tanh)),
    "two": (lambda x: F.silu(F.relu(x)) + x, lambda x: held(F.silu)(held(F.relu)(x)) + x),
    "gated by half": (
        lambda x: F.gelu(x.chunk(2, -1)[0]).repeat(1, 1, 2) * x.chunk(2, -1)[1].repeat(1, 1, 2),
        lambda x: F.gelu(x.chunk(2, -1)[0]).repeat(1, 1, 2).detach() * x.chunk(2, -1)[1].repeat(1, 1, 2),
    ),
    "gate times values in place": (
        lambda x: F.gelu(x).mul_(x.flip(-1)),
        lambda x: F.gelu(x).detach() * x.flip(-1),
    ),
    "sigmoid times values in place": (
        lambda x: (2 * x.sigmoid()).mul_(x.flip(-1)),
        lambda x: (2 * x.sigmoid()).detach() * x.flip(-1),
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
    "clamped away from zero": (nn.Hardtanh(0.1, 1.0), "Hardtanh"),
    "sigmoid": (torch.sigmoid, "Sigmoid"),
    "reciprocal": (lambda x: 1 / (x * x + 1), "Reciprocal"),
    "square": (lambda x: x * x, r"Mul \(of two branches, neither of them activated\)"),
    "bilinear": (lambda x: x * x.flip(-1), "Mul"),
    "relu times relu": (lambda x: F.relu(x) * F.relu(x.flip(-1)), "Mul"),
    "glu": (lambda x: F.glu(x).repeat(1, 1, 2), "Glu"),
    "in a view": (square_of_view, "CopySlices"),
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
