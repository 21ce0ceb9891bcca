"""Heads that read the tokens of several layers: equal shares for all of these tokens, each from its own layer down."""

import itertools

import pytest
import torch
import torch.nn.functional as F
import transformers
from naive_attribution import attention_and_gradients, layer_matrix, unfused_attention
from naive_balanced import balanced_run, naive_token_relevance
from small_networks import vit
from test_families import images, relative_error, shares, sharpened
from torch import nn

import gmarpp
from gmarpp.targets import Region

PRODUCTS = ("gmarpp_l1", "gmarpp_l2", "gmarpp_sum", "gmar_l1", "gmar_l2", "rollout", "chefer")
LAYERS = {0: range(1, 17), 2: [0], 3: range(1, 17)}


class Dense(nn.Module):
    """Logits of the patches of layer 0, the class token of layer 2, and the patches of the last one."""

    def __init__(self, layers=LAYERS, between=None):
        super().__init__()
        torch.manual_seed(0)
        self.vit, self.heads = sharpened(vit(depth=4, num_classes=0)), nn.ModuleList(nn.Linear(32, 5) for _ in layers)
        self.layers, self.between = layers, between
        self.eval()

    def forward(self, batch):
        tokens, total = self.vit._pos_embed(self.vit.patch_embed(batch)), 0
        for position, block in enumerate(self.vit.blocks):
            tokens = block(tokens if position == 0 or self.between is None else self.between(tokens))
            if position in self.layers:
                head = self.heads[list(self.layers).index(position)]
                total = total + head(F.layer_norm(tokens, (32,)))[:, list(self.layers[position])].mean(1)
        return total


def naive_rows(name, attentions, gradients, layers, image):
    """Give the row, (N,), of shares that join at each layer that is read on the way down."""
    tokens = attentions[0].shape[-1]
    count = sum(len(read) for read in layers.values())
    row = torch.zeros(tokens)
    for position in reversed(range(len(attentions))):
        if position in layers:
            row = row + shares(tokens, layers[position]) * len(layers[position]) / count
        row = row @ layer_matrix(name, attentions[position][image], gradients[position][image])
    return row


@pytest.mark.parametrize("recompute", [False, True])
def test_rows_join_at_each_layer_that_is_read(recompute):
    model, batch = Dense(), images()
    found = gmarpp.explain(model, batch, (*PRODUCTS, "token_relevance"), 3, recompute=recompute).maps
    attentions, gradients = attention_and_gradients(model, batch, lambda logits: logits[:, 3])
    for method, image in itertools.product(PRODUCTS, range(2)):
        expected = naive_rows(method, attentions, gradients, LAYERS, image)[1:].reshape(4, 4)
        assert relative_error(found[method][image], expected) < 1e-4, method
    alone = gmarpp.explain(model, batch, ["rollout", "random"], 3).maps["rollout"]
    assert relative_error(alone, found["rollout"]) < 1e-5
    torch.testing.assert_close(found["rollout"].flatten(1).sum(1), torch.ones(2), rtol=0.5, atol=0)


def test_token_relevance_counts_what_is_read_directly():
    model, batch = Dense(), images()
    found = gmarpp.explain(model, batch, ["token_relevance", "gmarpp_balanced"], lambda logits: logits[:, 3]).maps
    run = balanced_run(model, batch, lambda logits: logits[:, 3], model.vit.blocks)
    expected = naive_token_relevance(run, 1).reshape(2, 4, 4)
    assert relative_error(found["token_relevance"], expected) < 1e-4
    # Its row, as that of the products, with the residual's own share, and summed over layers.
    for image in range(2):
        row, total = torch.zeros(17), 0
        for position in reversed(range(4)):
            if position in LAYERS:
                row = row + shares(17, LAYERS[position]) * len(LAYERS[position]) / 33
            matrix = (run.gradients[position][image].clamp(min=0) * run.attentions[position][image]).sum(0)
            matrix = matrix + torch.diag((run.x[position][image] * run.dm[position][image]).sum(-1).clamp(min=0))
            sums = matrix.sum(1, keepdim=True)
            row = row @ torch.where(sums > 0, matrix / sums.where(sums > 0, 1), torch.eye(17))
            total = total + row
        assert relative_error(found["gmarpp_balanced"][image], total[1:].reshape(4, 4)) < 1e-4


def test_blocks_above_those_that_are_read_are_left_out():
    model, batch = Dense({0: range(1, 17), 1: [0]}), images()
    methods = (*PRODUCTS, "token_relevance", "gmarpp_balanced")
    found = gmarpp.explain(model, batch, methods, 3).maps
    model.vit.blocks = model.vit.blocks[:2]
    expected = gmarpp.explain(model, batch, methods, 3).maps
    assert all(relative_error(found[name], expected[name]) < 1e-5 for name in methods)


SMALL = {
    "hidden_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 3,
    "intermediate_size": 96,
    "image_size": 32,
    "patch_size": 8,
    "attn_implementation": "sdpa",
}
NECK = {"neck_hidden_sizes": [16, 24, 32, 32], "fusion_hidden_size": 16}


def dense_network(kind):
    torch.manual_seed(0)
    if kind.startswith("DPT"):
        config = transformers.DPTConfig(
            **SMALL, **NECK, backbone_out_indices=[0, 1, 2, 3], num_labels=5, use_auxiliary_head=False
        )
    elif kind.startswith("Beit"):
        # Counted from the embeddings, as in the network that is published: the last block is not read.
        config = transformers.BeitConfig(
            **(SMALL | {"num_hidden_layers": 5}), out_indices=[2, 3, 4, 5], pool_scales=[1, 2], num_labels=5,
            use_auxiliary_head=False,
        )  # fmt: skip
    else:
        stages = ["stage1", "stage2", "stage3", "stage4"]
        config = transformers.DepthAnythingConfig(
            backbone_config=transformers.Dinov2Config(**SMALL, out_features=stages, reshape_hidden_states=False),
            reassemble_hidden_size=48, patch_size=8, head_hidden_size=8, **NECK,
        )  # fmt: skip
    return sharpened(getattr(transformers, kind)(config))


# kind: which of the tokens of which layers the head reads
NETWORKS = {
    "DPTForSemanticSegmentation": dict.fromkeys(range(4), range(17)),
    "DPTForDepthEstimation": dict.fromkeys(range(4), range(17)),
    "DepthAnythingForDepthEstimation": dict.fromkeys(range(4), range(1, 17)),
    "BeitForSemanticSegmentation": dict.fromkeys(range(4), range(1, 17)),
}


@pytest.mark.parametrize("kind", NETWORKS)
def test_dense_heads_equal_the_naive_reference(kind):
    model, batch, layers = dense_network(kind), images(), NETWORKS[kind]
    target = Region(torch.ones(32, 32, dtype=torch.bool), None if "Depth" in kind else 2)
    found = gmarpp.explain(model, batch, PRODUCTS, target).maps
    with unfused_attention() as collected:
        output = model(batch.clone().requires_grad_())
    attentions = collected[: max(layers) + 1]
    gradients = torch.autograd.grad(target(output).sum(), attentions)
    attentions = [each.detach() for each in attentions]
    for method, image in itertools.product(PRODUCTS, range(2)):
        row = naive_rows(method, attentions, gradients, layers, image)[1:17].reshape(4, 4)
        assert relative_error(found[method][image], row) < 1e-4, method


@pytest.mark.parametrize("method", ["legrad", "attention"])
def test_methods_of_one_layer_are_refused(method):
    with pytest.raises(gmarpp.UnsupportedNetworkError, match=rf"blocks \[0, 2\] directly.* {method} would see one"):
        gmarpp.explain(Dense(), images(), [method, "gmarpp_l1"], 3)


def test_what_cannot_be_told_apart_is_refused():
    """Tokens that change between blocks, and what a block keeps."""
    with pytest.raises(gmarpp.UnsupportedNetworkError, match=r"blocks \[0, 2\] directly, from inside a block or in a"):
        gmarpp.explain(Dense(between=lambda tokens: tokens * 1.5), images(), "gmarpp_l1", 3)
    inside = Dense({3: [0]})
    kept = []
    inside.vit.blocks[1].mlp.register_forward_hook(lambda module, args, output: kept.append(output))
    inside.heads[0].register_forward_hook(lambda module, args, output: output + kept.pop().mean())
    with pytest.raises(gmarpp.UnsupportedNetworkError, match=r"blocks \[0\] directly, from inside"):
        gmarpp.explain(inside, images(), "gmarpp_l1", 3)


def test_a_score_of_a_lower_block_is_explained_from_there():
    model, batch, kept = vit(depth=3), images(), []
    model.blocks[1].register_forward_hook(lambda module, args, output: kept.append(output))
    found = gmarpp.explain(model, batch, PRODUCTS, lambda output: kept[-1][:, 3].square().sum(1)).maps
    with unfused_attention() as collected:
        model(batch.clone().requires_grad_())
    attentions = collected[:2]
    gradients = torch.autograd.grad(kept[-1][:, 3].square().sum(), attentions)
    attentions = [each.detach() for each in attentions]
    for method, image in itertools.product(PRODUCTS, range(2)):
        row = naive_rows(method, attentions, gradients, {1: [3]}, image)[1:].reshape(4, 4)
        assert relative_error(found[method][image], row) < 1e-4, method


def test_a_block_whose_tokens_are_changed_in_place_is_followed():
    model = Dense({3: [0]}, between=lambda tokens: tokens.mul_(1.5))
    batch = images()
    found = gmarpp.explain(model, batch, ["gmarpp_l1", "chefer"], 3).maps
    attentions, gradients = attention_and_gradients(model, batch, lambda logits: logits[:, 3])
    for method, image in itertools.product(found, range(2)):
        row = naive_rows(method, attentions, gradients, {3: [0]}, image)[1:].reshape(4, 4)
        assert relative_error(found[method][image], row) < 1e-4
