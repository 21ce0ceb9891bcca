import pytest
import timm
import torch
from torch.profiler import ProfilerActivity, profile

import gmarpp

LONG = {"img_size": 96, "patch_size": 4}  # 577 tokens
SHORT = {"img_size": 32, "patch_size": 4}


def vit(depth, **options):
    torch.manual_seed(0)
    size = {"embed_dim": 16, "num_heads": 2, "num_classes": 5, "depth": depth}
    model = timm.create_model("vit_tiny_patch16_224", **(size | options)).eval()
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.data.mul_(4)
    return model


def images(size=96):
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


def assert_recomputed_alike(model, batch, methods=gmarpp.METHODS, target=None):
    expected = gmarpp.explain(model, batch, methods, target).maps
    found = gmarpp.explain(model, batch, methods, target, recompute=True).maps
    for name in found:
        assert expected[name].std() > 0
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("options", [{}, {"global_pool": "avg"}, {"reg_tokens": 4}, {"class_token": False}])
@pytest.mark.parametrize("target", [None, torch.tensor([[0, 1, 2], [4, 3, 1]])])
def test_deep_networks_on_long_sequences_have_the_same_maps(options, target):
    if "class_token" in options:
        options = options | {"global_pool": "avg"}
    assert_recomputed_alike(vit(14, **LONG, **options), images(), target=target)


def test_recomputes_under_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        assert_recomputed_alike(vit(9, **LONG), images())


class Steered(torch.nn.Module):
    """Blocks between which something else happens to the tokens."""

    def __init__(self, in_place):
        super().__init__()
        self.vit, self.in_place = vit(10, **LONG), in_place

    def forward(self, batch):
        tokens = self.vit._pos_embed(self.vit.patch_embed(batch))
        for position, block in enumerate(self.vit.blocks):
            if self.in_place and position:
                tokens.mul_(1 + position / 10)
            elif position % 3 == 2:
                tokens = tokens * (1 + position / 10)
            tokens = block(tokens)
        return self.vit.forward_head(self.vit.norm(tokens))


@pytest.mark.parametrize("in_place", [False, True])
def test_what_happens_between_blocks_is_not_left_out(in_place):
    model = Steered(in_place)
    layout = gmarpp.Architecture(
        lambda height, width: (height // 4, width // 4),
        prefix_tokens=1,
        blocks=model.vit.blocks,
        head=lambda tokens: model.vit.forward_head(model.vit.norm(tokens)),
    )
    methods = ("gmarpp_l1", "gmar_l2", "rollout", "chefer") + (() if in_place else ("legrad",))
    expected = gmarpp.explain(model, images(), methods, architecture=layout).maps
    found = gmarpp.explain(model, images(), methods, architecture=layout, recompute=True).maps
    for name in methods:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-9)


def runs_of_blocks(depth, target=None, **options):
    """Count how often the blocks below the last one run."""
    model, runs = vit(depth, **options), 0

    def count(*_):
        nonlocal runs
        runs += 1

    for block in model.blocks[:-1]:
        block.norm1.register_forward_pre_hook(count)
    gmarpp.explain(model, images(options["img_size"]), target=target, recompute=True)
    return runs


@pytest.mark.parametrize("size", [SHORT, LONG])
def test_each_block_runs_once_and_once_for_each_class(size):
    assert runs_of_blocks(6, **size) == 2 * 5
    assert runs_of_blocks(6, torch.tensor([[0, 1, 2], [2, 3, 4]]), **size) == 4 * 5


def peak_bytes(depth, recompute, **options):
    """Most bytes that tensors take at any moment of one call."""
    model, batch = vit(depth, **LONG, **options), images()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        gmarpp.explain(model, batch, (*gmarpp.METHODS, *gmarpp.VARIANTS), recompute=recompute)
    events = profiled.profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    in_use = peak = 0
    for _, change in changes:
        in_use += change
        peak = max(peak, in_use)
    return peak


@pytest.mark.parametrize("pool", ["token", "avg"])
def test_memory_grows_by_a_few_tensors_of_tokens_per_block(pool):
    tokens = 2 * 577 * 16 * 4  # bytes of a block's input
    recomputed, kept = (
        (peak_bytes(16, recompute, global_pool=pool) - peak_bytes(8, recompute, global_pool=pool)) / 8
        for recompute in (True, False)
    )
    # Where the head reads all tokens, every layer's own score has a gradient as large as a block's input.
    assert recomputed < (1.5 if pool == "token" else 2.5) * tokens
    assert kept > 4 * recomputed
