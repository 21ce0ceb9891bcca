"""The last block's tail is differentiated for the tokens that the head reads: no other has a gradient there."""

import dataclasses

import pytest
import torch
from test_explain import images, logit_of, vit
from test_recompute import peak_bytes
from test_whole_networks import PRODUCTS, TARGET, assert_maps_are_the_naive_ones, flops
from torch import nn

import gmarpp


def test_the_last_tail_costs_little_where_the_head_reads_a_class_token():
    plain, hooked = vit(depth=2, mlp_ratio=16), vit(depth=2, mlp_ratio=16)
    # Whoever hooks the head sees it run once, so what it reads is not known before the last block runs.
    hooked.norm.register_forward_hook(lambda *_: None)
    assert flops(plain, "gmarpp_l1") < 0.85 * flops(hooked, "gmarpp_l1")
    maps, expected = (gmarpp.explain(model, images(), PRODUCTS, TARGET).maps for model in (plain, hooked))
    for name in PRODUCTS:
        torch.testing.assert_close(maps[name], expected[name], rtol=1e-5, atol=1e-8)


def test_the_last_block_keeps_nothing_for_the_backward_pass():
    tokens = 2 * 577 * 16 * 4
    read_one, read_all = (peak_bytes(4, False, mlp_ratio=16, global_pool=pool) for pool in ("token", "avg"))
    # Of the MLP's 16 hidden values for each channel, the values stay and the gradients double them.
    assert read_all - read_one > 30 * tokens


class Several(nn.Module):
    """What the score depends on, beside the last block's class token."""

    def __init__(self, kind):
        super().__init__()
        self.vit, self.kind = vit(), kind

    def forward(self, batch):
        tokens = self.vit.blocks(self.vit._pos_embed(self.vit.patch_embed(batch)))
        if self.kind == "patches":
            tokens = tokens + tokens.mean(1, keepdim=True)
        elif self.kind == "in place":
            tokens.mul_(1.5)
        return self.vit.forward_head(self.vit.norm(tokens))


@pytest.mark.parametrize("kind", ["patches", "in place"])
def test_a_score_that_depends_on_more_is_followed_all_the_way(kind):
    model, batch = Several(kind), images()
    layout = gmarpp.architecture_of(model.vit)
    for recompute in (False, True):
        found = gmarpp.explain(model, batch, PRODUCTS, TARGET, architecture=layout, recompute=recompute).maps
        read = range(17) if kind == "patches" else [0]
        assert_maps_are_the_naive_ones(model, batch, found, logit_of(TARGET), read)


class Keeping(nn.Module):
    """A block whose patch tokens the head finds in an attribute."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, tokens):
        tokens = self.block(tokens)
        self.kept = tokens[:, 1:].mean(dim=1)
        return tokens


@pytest.mark.parametrize("method", ["gmarpp_l1", "chefer"])
def test_what_a_block_leaves_in_an_attribute_is_followed_or_refused(method):
    model = vit()
    model.blocks[-1] = last = Keeping(model.blocks[-1])
    of_tokens = model.forward_head
    model.forward_head = lambda tokens, **_: of_tokens(tokens) + 3 * model.head(last.kept)
    model(images())
    with pytest.raises(gmarpp.UnsupportedNetworkError, match=r"from an attribute.*head=None"):
        gmarpp.explain(model, images(), method, TARGET)
    whole = dataclasses.replace(gmarpp.architecture_of(model), head=None)
    found = gmarpp.explain(model, images(), method, TARGET, architecture=whole).maps
    assert_maps_are_the_naive_ones(model, images(), found, logit_of(TARGET), range(17))


class Counting(nn.Module):
    """An MLP that gives another result each time."""

    def __init__(self, mlp):
        super().__init__()
        self.mlp, self.runs = mlp, 0

    def forward(self, tokens):
        self.runs += 1
        return self.mlp(tokens) * self.runs


def test_a_last_block_that_cannot_run_again_is_an_error():
    model = vit()
    model.blocks[-1].mlp = Counting(model.blocks[-1].mlp)
    with pytest.raises(gmarpp.UnsupportedNetworkError, match="run a second time, returns other tokens"):
        gmarpp.explain(model, images(), target=TARGET)
