"""The balanced gradient and its methods written out naively, by plain autograd through constants.

Every function that the rule knows is replaced by one with the same value whose constant factors are detached. Attention
is unfused, every matrix is kept, and matrices are multiplied. Nothing here comes from gmarpp.
"""

import contextlib
import math
from types import SimpleNamespace

import torch
import torch.nn.functional as F

ACTIVATIONS = ("gelu", "silu", "relu", "mish", "hardswish", "elu", "leaky_relu", "tanh")


def held(activation):
    """Give an activation whose gate y / x is constant."""

    def call(x, *args, inplace=False, **options):
        y = activation(x, *args, **options)
        return x * torch.where(x == 0, 0.5, y / x).detach()

    return call


def layer_norm(x, shape, weight=None, bias=None, eps=1e-5):
    dims = tuple(range(-len(shape), 0))
    std = (x.var(dims, unbiased=False, keepdim=True) + eps).sqrt().detach()
    x = (x - x.mean(dims, keepdim=True)) / std
    x = x if weight is None else x * weight
    return x if bias is None else x + bias


def rms_norm(x, shape, weight=None, eps=None):
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    x = x / (x.pow(2).mean(tuple(range(-len(shape), 0)), keepdim=True) + eps).sqrt().detach()
    return x if weight is None else x * weight


def normalize(x, p=2.0, dim=1, eps=1e-12):
    return x / x.norm(p, dim, keepdim=True).clamp_min(eps).detach()


def shared(x, share):
    return share * x + (1 - share) * x.detach()


@contextlib.contextmanager
def constants_held(share=0.25):
    """Give the list that collects the attention matrices, in forward order."""
    collected = []

    def attend(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
        assert not is_causal
        assert not enable_gqa
        scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
        scores = shared(query, share) @ shared(key, share).mT * scale
        attention = (scores if attn_mask is None else scores + attn_mask).softmax(-1)
        # The matrix stands in the graph even where nothing goes on to queries and keys.
        attention = attention if attention.requires_grad else attention.requires_grad_()
        collected.append(attention)
        return attention @ value

    replaced = {name: held(getattr(F, name)) for name in ACTIVATIONS}
    replaced |= {"layer_norm": layer_norm, "rms_norm": rms_norm, "normalize": normalize}
    replaced["scaled_dot_product_attention"] = attend
    kept, fast_path = {name: getattr(F, name) for name in replaced}, torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    for name, function in replaced.items():
        setattr(F, name, function)
    try:
        yield collected
    finally:
        for name, function in kept.items():
            setattr(F, name, function)
        torch.backends.mha.set_fastpath_enabled(fast_path)


def hold_by_class(model):
    """Hold constant what modules multiply by hand, and functions that they keep to themselves; give the hooks."""
    hooks = []
    for module in model.modules():
        kind = type(module).__name__
        if kind == "RmsNorm":
            hold = lambda own, args, y: rms_norm(args[0], own.normalized_shape, own.weight, own.eps)  # noqa: E731
        elif "GELU" in kind or kind in ("SiLUActivation", "Tanh"):
            hold = lambda _, args, y: held(lambda _: y)(args[0])  # noqa: E731
        elif kind in ("SwiGLU", "GluMlp", "Dinov2SwiGLUFFN"):
            module, hold = module.act, lambda _, args, y: y.detach()
        elif kind in ("SEModule", "SqueezeExcitation"):
            gate = module.gate if kind == "SEModule" else module.scale_activation
            module, hold = gate, lambda _, args, y: y.detach()
        else:
            continue
        hooks.append(module.register_forward_hook(hold))
    return hooks


def margin_of(target):
    """Give the log-odds of each image's class, written out as probabilities."""

    def score(logits):
        chosen = torch.nn.functional.one_hot(target, logits.shape[1]).bool()
        weights = logits.double().exp()
        return (weights[chosen] / weights.masked_fill(chosen, 0).sum(1)).log()

    return score


def watch_addition(block, added):
    """Collect the tokens behind the addition of attention, which are given to the module that comes next."""
    kind = type(block).__name__
    # Attention and MLP are added together, or there is no MLP.
    if "Parallel" in kind or kind == "MobileAttention" or kind.startswith("Levit"):
        return block.register_forward_hook(lambda _, args, output: added.append(output))
    norms = ("projection", "norm2", "layernorm_after", "layer_norm2", "layer_norm_2", "ln_2", "local_conv")
    # Norms behind attention and MLP: the MLP is given the tokens themselves.
    is_post_norm = "Post" in kind or ("Swin" in kind and "v2" in kind.lower())
    names = ("mlp", "intermediate") if is_post_norm else (*norms, "mlp", "mlp_layer", "act")
    following = next(getattr(block, name) for name in names if hasattr(block, name))
    return following.register_forward_pre_hook(lambda _, args: added.append(args[0]))


def balanced_run(model, images, score, blocks, share=0.25, written=()):
    """Give all that the methods are made of, lowest layer first: x, dx, m, dm, A and G; and the score.

    Attention that the network writes out is collected elsewhere, in `written`.
    """
    entered, added = [], []
    hooks = hold_by_class(model)
    for block in blocks:
        hooks.append(block.register_forward_pre_hook(lambda _, args: entered.append(args[0])))
        hooks.append(watch_addition(block, added))
    try:
        with constants_held(share) as attentions:
            total = score(model(images.clone().requires_grad_()))
            layers = (entered, added, [*attentions, *written])
            found = torch.autograd.grad(total.sum(), [each for layer in layers for each in layer])
    finally:
        for hook in hooks:
            hook.remove()
    x, m, a = ([each.detach() for each in layer] for layer in layers)
    dx, dm, g = found[: len(x)], found[len(x) : len(x) + len(m)], found[len(x) + len(m) :]
    return SimpleNamespace(x=x, dx=dx, m=m, dm=dm, attentions=a, gradients=list(g), score=total.detach())


def naive_token_relevance(run, prefix):
    """Give the map, (B, patches)."""
    total = 0
    for x, dx in zip(run.x, run.dx, strict=True):
        relevance = (x * dx).sum(-1)[:, prefix:]
        total = total + relevance / relevance.abs().sum(1, keepdim=True)
    return total


def naive_balanced_rollout(run, readout, image):
    """Give the sum over layers of the readout's row of the product M_L ... M_l for one image, (N,)."""
    total, product = 0, torch.eye(run.x[0].shape[1])
    layers = list(zip(run.x, run.dm, run.attentions, run.gradients, strict=False))
    for x, dm, attention, gradient in reversed(layers):
        relevance = (gradient[image].clamp(min=0) * attention[image]).sum(0)
        kept = torch.tensor([max(0.0, float(a @ b)) for a, b in zip(x[image], dm[image], strict=True)])
        matrix = relevance + torch.diag(kept)
        for row, sum_of_row in enumerate(matrix.sum(1)):
            if sum_of_row > 0:
                matrix[row] /= sum_of_row
            else:
                matrix[row, row] = 1
        product = product @ matrix
        total = total + readout @ product
    return total
