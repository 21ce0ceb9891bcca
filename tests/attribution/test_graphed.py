"""Calls captured as CUDA graphs make the maps of `explain`; what they decide is tested on the CPU, too."""

import pytest
import torch
from test_explain import images, relative_error, vit
from torch.utils._python_dispatch import TorchDispatchMode

import gmarpp
from gmarpp.attribution.decisions import Decisions, deciding
from gmarpp.attribution.explain import Request

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
EVERY = (*gmarpp.METHODS, *gmarpp.VARIANTS)
NETWORKS = {"class token": {}, "average pool": {"global_pool": "avg"}, "attention pool": {"global_pool": "map"}}


class NothingIsWaitedFor(TorchDispatchMode):
    """Fails where Python would wait for a GPU to decide something."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        reads = function is torch.ops.aten._local_scalar_dense.default and args[0].dtype == torch.bool
        assert not reads
        assert function is not torch.ops.aten.nonzero.default
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("target", [None, 1], ids=["predicted", "given"])
def test_decisions_taken_once_more_lead_to_the_same_maps(network, target):
    model, batch = vit(**NETWORKS[network]), images(3)
    request, decisions = Request.of(model, batch, EVERY, target), Decisions()
    with request.running(), deciding(decisions):
        request.maps(batch)
        decisions.repeat(batch.device)
        with NothingIsWaitedFor():
            found, _ = request.maps(batch.flip(0))
    assert decisions.taken
    assert decisions.are_right()
    expected = gmarpp.explain(model, batch.flip(0), EVERY, target).maps
    for name in EVERY:
        assert torch.equal(found[name], expected[name]), name


def test_a_decision_that_would_be_another_shows():
    model, batch = vit(), images(3)
    request, decisions = Request.of(model, batch, ["gmarpp_l1", "legrad"], None), Decisions()
    unusable = batch.clone()
    unusable[1, 0, 0, 0] = torch.nan
    with request.running(), deciding(decisions):
        request.maps(batch)
        decisions.repeat(batch.device)
        request.maps(unusable)
    assert not decisions.are_right()
    with pytest.raises(ValueError, match=r"logits of images \[1\] are not finite"):
        gmarpp.explain(model, unusable, EVERY)


def test_it_needs_a_gpu():
    with pytest.raises(ValueError, match="GraphedExplain: expected images on a CUDA device, got cpu: use explain"):
        gmarpp.GraphedExplain(vit(), images(2))


@needs_cuda
@pytest.mark.cuda
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16], ids=str)
def test_a_replay_makes_the_maps_of_explain(network, precision):
    model, batch = vit(**NETWORKS[network]).cuda(), images(4).cuda()
    with torch.autocast("cuda", precision, enabled=precision != torch.float32):
        graphed = gmarpp.GraphedExplain(model, batch, EVERY)
        for each in (batch, batch.flip(0) * 0.5):
            found, expected = graphed(each), gmarpp.explain(model, each, EVERY)
            assert torch.equal(found.target, expected.target)
            for name in EVERY:
                assert relative_error(found.maps[name].cpu(), expected.maps[name].cpu()) < 1e-5, name


@needs_cuda
@pytest.mark.cuda
def test_a_replay_follows_weights_and_leaves_the_unusual_to_explain():
    model, batch = vit().cuda(), images(4).cuda()
    graphed = gmarpp.GraphedExplain(model, batch, ["gmarpp_l1"], target=2)
    first = graphed(batch).maps["gmarpp_l1"]
    with torch.no_grad():
        model.blocks[0].attn.qkv.weight.mul_(1.5)
    found, expected = (
        call(batch).maps["gmarpp_l1"] for call in (graphed, lambda each: gmarpp.explain(model, each, target=2))
    )
    assert relative_error(found.cpu(), expected.cpu()) < 1e-5
    assert relative_error(found.cpu(), first.cpu()) > 1e-3
    with pytest.raises(ValueError, match=r"logits of images \[1\] are not finite"):
        graphed(torch.where(torch.arange(4, device="cuda")[:, None, None, None] == 1, torch.nan, batch))
    with pytest.raises(ValueError, match=r"expected images torch\.float32"):
        graphed(batch[:2])
