"""Blocks of which the tokens and the addition of attention can be followed, and others."""

import pytest
import torch
from naive_balanced import balanced_run, margin_of
from test_balanced import BOTH, TARGET, assert_equals_the_reference
from test_explain import images, vit
from test_families import shares
from torch import nn

import gmarpp


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
    model, other, batch = in_order("post-norm"), in_order("post-norm"), images()
    found = gmarpp.explain(model, batch, BOTH, TARGET).maps
    assert_equals_the_reference(found, balanced_run(other, batch, margin_of(TARGET), other.blocks), shares(17, [0]), 1)


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


class FrozenBelow(nn.Module):
    """Blocks below the second run without gradients."""

    def __init__(self):
        super().__init__()
        self.vit = vit()

    def forward(self, batch):
        tokens = self.vit._pos_embed(self.vit.patch_embed(batch))
        with torch.no_grad():
            tokens = self.vit.blocks[0](tokens)
        for block in self.vit.blocks[1:]:
            tokens = block(tokens)
        return self.vit.forward_head(self.vit.norm(tokens))


@pytest.mark.parametrize("methods", BOTH)
def test_a_cut_gradient_is_named(methods):
    model = FrozenBelow()
    with pytest.raises(gmarpp.UnsupportedNetworkError, match="no gradient passes from attention layer 1 to"):
        gmarpp.explain(model, images(), methods, TARGET, architecture=gmarpp.architecture_of(model.vit))
