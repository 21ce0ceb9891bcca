"""Blocks that attend several times at once: parallel attention, whose heads add up, and differential attention."""

import itertools

import pytest
import torch
from naive_attribution import attention_and_gradients, naive_row
from test_explain import images, logit_of, relative_error, vit
from torch import nn

import gmarpp

TARGET = torch.tensor([1, 4, 2])
BLIND = ("gmar_l1", "gmar_l2", "rollout", "attention")
SIGNED = ("gmarpp_l1", "gmarpp_l2", "gmarpp_sum", "chefer")


def joined(calls):
    """One matrix per layer, with the heads of both calls."""
    return [torch.cat(pair, dim=1) for pair in zip(calls[::2], calls[1::2], strict=True)]


def naive_legrad_of_pairs(model, batch, score):
    """Give LeGrad's relevance of all tokens, (B, N), where blocks attend twice."""
    layers = []
    for position in range(len(model.blocks)):

        class Cut(nn.Module):
            def forward(self, batch, position=position):
                tokens = model._pos_embed(model.patch_embed(batch))
                for block in model.blocks[: position + 1]:
                    tokens = block(tokens)
                return model.forward_head(model.norm(tokens))

        _, gradients = attention_and_gradients(Cut(), batch, score)
        layers.append(torch.cat(gradients[-2:], dim=1).clamp(min=0).mean((1, 2)))
    return torch.stack(layers).mean(0)


NETWORKS = {
    "parallel": ({"name": "vit_small_patch16_18x2_224", "depth": 3}, BLIND + SIGNED),
    "differential": ({"attn_layer": "diff"}, SIGNED),
    "differential, average": ({"attn_layer": "diff", "global_pool": "avg"}, SIGNED),
    "differential, parallel block": ({"name": "vit_dpwee_patch16_reg1_gap_256"}, SIGNED),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_calls_of_a_block_are_one_layer_with_the_heads_of_all(name):
    options, products = NETWORKS[name]
    model, batch = vit(**options), images()
    score = logit_of(TARGET)
    prefix = model.num_prefix_tokens
    found = gmarpp.explain(model, batch, (*products, "legrad"), TARGET).maps
    attentions, gradients = (joined(each) for each in attention_and_gradients(model, batch, score))
    readout = torch.zeros(prefix + 16)
    readout[slice(0, 1) if model.global_pool == "token" else slice(prefix, None)] = 1
    for method, image in itertools.product(products, range(3)):
        expected = naive_row(method, attentions, gradients, readout / readout.sum(), image)[prefix:].reshape(4, 4)
        assert relative_error(found[method][image], expected) < 1e-4, method
    expected = naive_legrad_of_pairs(model, batch, score)[:, prefix:].reshape(3, 4, 4)
    assert relative_error(found["legrad"], expected) < 1e-4
    recomputed = gmarpp.explain(model, batch, (*products, "legrad"), TARGET, recompute=True).maps
    assert all(relative_error(recomputed[method], found[method]) < 1e-5 for method in found)


def test_methods_that_would_add_what_is_subtracted_are_named():
    with pytest.raises(
        gmarpp.UnsupportedNetworkError, match=r"differential attention does.*: gmar_l1, rollout would add"
    ):
        gmarpp.explain(vit(attn_layer="diff"), images(), ["gmarpp_l1", "gmar_l1", "rollout"])


class Twice(nn.Module):
    """A block that attends to what it attended to."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, tokens):
        return self.block(tokens + self.block.attn(self.block.norm1(tokens)))


def test_calls_of_a_block_one_after_the_other_are_no_single_layer():
    model = vit()
    model.blocks[1] = Twice(model.blocks[1])
    for recompute in (False, True):
        message = "block 1 of 4 calls attention several times, one after"
        with pytest.raises(gmarpp.UnsupportedNetworkError, match=message):
            gmarpp.explain(model, images(), "gmarpp_l1", recompute=recompute)
    with pytest.raises(gmarpp.UnsupportedNetworkError, match=r"seen by gradients alone.*\(gmarpp_l1\)"):
        gmarpp.explain(model, images(), "rollout")
