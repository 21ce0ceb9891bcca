"""The methods written out naively: unfused attention kept whole, explicit matrix products, plain autograd.

Nothing here comes from gmarpp. Attention is computed by hand in place of the fused call, with every matrix kept.
"""

import contextlib
import math

import torch
import torch.nn.functional as F


@contextlib.contextmanager
def unfused_attention():
    """Give the list that collects the attention matrices, in forward order."""
    collected = []
    original = F.scaled_dot_product_attention

    def attend(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
        assert dropout_p == 0
        assert not is_causal
        assert not enable_gqa
        scores = query @ key.transpose(-2, -1) * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
        if attn_mask is not None:
            scores = scores + attn_mask
        attention = scores.softmax(dim=-1)
        if attention.requires_grad:
            collected.append(attention)
        return attention @ value

    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    F.scaled_dot_product_attention = attend
    try:
        yield collected
    finally:
        F.scaled_dot_product_attention = original
        torch.backends.mha.set_fastpath_enabled(fast_path)


def attention_and_gradients(model, images, score):
    """Give lists of A and G, lowest layer first, for a score function of the model's output."""
    model.eval()
    with unfused_attention() as collected:
        output = model(images.clone().requires_grad_())
        attentions = list(collected)
        gradients = torch.autograd.grad(score(output).sum(), attentions)
    return [a.detach() for a in attentions], list(gradients)


def row_normalized(matrix):
    return matrix / matrix.sum(dim=-1, keepdim=True)


def layer_matrix(name, attention, gradient, alpha=1.0, keys=None):
    """Give M_l of one image, (Q, N), from A and G of shape (H, Q, N), or (H, Q, K) for keys made of tokens, (K, N)."""
    heads, tokens, attended = attention.shape
    keys = torch.eye(attended) if keys is None else keys
    identity = torch.eye(tokens, keys.shape[1])
    if name == "rollout":
        return row_normalized(attention.mean(0) @ keys + alpha * identity)
    if name.startswith("gmar_"):
        p = int(name[-1])
        norms = torch.stack([gradient[h].abs().pow(p).sum().pow(1 / p) for h in range(heads)])
        weights = norms / norms.sum()
        return row_normalized(sum(weights[h] * attention[h] for h in range(heads)) @ keys + alpha * identity)
    if name.startswith("gmarpp_"):
        positive = gradient.clamp(min=0)
        if positive.sum() == 0:
            return identity
        if name == "gmarpp_sum":
            return row_normalized((positive * attention).sum(0) @ keys + alpha * identity)
        p = int(name[-1])
        norms = torch.stack([positive[h].pow(p).sum().pow(1 / p) for h in range(heads)])
        weights = norms / norms.sum()
        relevance = sum(weights[h] * positive[h] * attention[h] for h in range(heads))
        return row_normalized(relevance @ keys + alpha * identity)
    if name == "chefer":
        return alpha * identity + (gradient * attention).clamp(min=0).mean(0) @ keys
    raise KeyError(name)


def naive_row(name, attentions, gradients, readout, image, alpha=1.0):
    """Give the readout's row of the product M_L ... M_1 for one image, (N,)."""
    attentions, gradients = [a[image] for a in attentions], [g[image] for g in gradients]
    if name == "attention":
        return torch.stack([readout @ head for head in attentions[-1]]).mean(0)
    product = torch.eye(attentions[0].shape[-1])
    for attention, gradient in zip(attentions, gradients, strict=True):
        product = layer_matrix(name, attention, gradient, alpha) @ product
    return readout @ product


def pool_start(name, attention, gradient):
    """Give the row that an attention pool hands to its keys, (N,), from A and G of one query, (H, N)."""
    if name in ("rollout", "attention"):
        return attention.mean(0)
    if name == "chefer":
        return (gradient * attention).clamp(min=0).mean(0)
    if name.startswith("gmar_"):
        norms = gradient.abs().sum(1) if name.endswith("l1") else gradient.pow(2).sum(1).sqrt()
        return ((norms / norms.sum())[:, None] * attention).sum(0)
    positive = gradient.clamp(min=0)
    if name == "gmarpp_sum":
        weights = torch.ones(len(positive))
    else:
        norms = positive.sum(1) if name.endswith("l1") else positive.pow(2).sum(1).sqrt()
        weights = norms / norms.sum()
    return row_normalized((weights[:, None] * positive * attention).sum(0))


def naive_legrad(model, images, blocks, head, score):
    """Give LeGrad's relevance of all tokens, (B, N), from each block's own score on one whole graph."""
    model.eval()
    outputs = []
    handles = [
        block.register_forward_hook(lambda module, args, out: outputs.append(out[0] if isinstance(out, tuple) else out))
        for block in blocks
    ]
    try:
        with unfused_attention() as collected:
            model(images.clone().requires_grad_())
            attentions = list(collected)[: len(blocks)]
            layers = [
                torch.autograd.grad(score(head(tokens)).sum(), attention, retain_graph=True)[0]
                for tokens, attention in zip(outputs, attentions, strict=True)
            ]
    finally:
        for handle in handles:
            handle.remove()
    return torch.stack([gradient.clamp(min=0).mean(dim=1).mean(dim=1) for gradient in layers]).mean(dim=0)
