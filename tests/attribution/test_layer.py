"""What a layer gives to methods, dense and fused, and that both make the same maps."""

import importlib.util
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from test_explain import images, relative_error, vit
from test_fused import layer as tensors
from test_fused import matrices
from torch import nn

import gmarpp
from gmarpp.attribution import Method, plan
from gmarpp.attribution.fused_layer import FusedLayer
from gmarpp.attribution.layer import AttentionLayer
from gmarpp.attribution.methods import Rollout

ALL = gmarpp.METHODS + gmarpp.VARIANTS
NORMS = ("gradient_l1", "gradient_l2", "positive_l1", "positive_l2")

cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")


def products(kind, query, key, value, outer, mask):
    """Give all that a layer offers, by name."""
    layer = kind(
        query, key, value, mask, 0.3, outer, outer[:, :, :2], 4.0, is_top=False, is_pool=False, depth=1, index=0
    )
    generator = torch.Generator().manual_seed(2)
    rows = [
        torch.rand(*query.shape[:2], count, query.shape[2], generator=generator).to(query.device) for count in (1, 3)
    ]
    found = {name: layer.head_norm(name) for name in NORMS} | {
        f"{name} share": layer.head_share(name) for name in NORMS
    }
    found |= {"row sums": layer.product_rows, "local": layer.local_key_sums()}
    found |= dict(zip(("by attention", "by product"), layer.carry(*rows), strict=True))
    return found | {"attention": layer.attention, "gradient": layer.gradient, "rows": rows}


MASKS = {
    "none": None,
    "boolean": torch.rand(20, 20, generator=torch.Generator().manual_seed(1)) > 0.3,
    "boolean, of keys": torch.arange(20)[None] < 13,
    "bias": torch.randn(1, 4, 20, 20, generator=torch.Generator().manual_seed(1)),
    "causal bias": torch.zeros(20, 20).masked_fill(~torch.ones(20, 20).tril().bool(), float("-inf")),
    "a query that attends to nothing": torch.arange(20)[:, None].expand(20, 20) != 5,
}
SHAPES = {
    "self-attention": {},
    "pool": {"queries": 3},
    "grouped queries": {"key_heads": 2},
    "other values": {"value_size": 24},
}


def cases():
    yield from ((SHAPES["self-attention"], mask) for mask in MASKS.values())
    yield from ((shape, None) for shape in SHAPES.values())


def matched(found, expected, tolerance):
    for name, each in found.items():
        if name != "rows":
            assert relative_error(each.cpu(), expected[name].cpu()) < tolerance, name


@pytest.mark.parametrize(("shape", "mask"), list(cases()))
def test_products_are_those_of_matrices_written_out(shape, mask):
    query, key, value, outer = tensors(**({"batch": 2, "heads": 4} | shape))
    found = products(AttentionLayer, query, key, value, outer, mask)
    _, attention, gradient = matrices(query, key, value, outer, mask, scale=0.3, gradient_scale=4.0)
    positive, (attention_rows, product_rows) = gradient.relu(), (each.double() for each in found["rows"])
    norms = (gradient.abs().sum((2, 3)), gradient.norm(dim=(2, 3)), positive.sum((2, 3)), positive.norm(dim=(2, 3)))
    expected = dict(zip(NORMS, norms, strict=True))
    expected |= {f"{name} share": norm / norm.sum(1, keepdim=True) for name, norm in expected.items()}
    expected |= {"row sums": (positive * attention).sum(-1), "local": positive[:, :, :2].sum((1, 2))}
    expected |= {"by attention": (attention_rows @ attention).sum(1)}
    expected |= {"by product": (product_rows @ (positive * attention)).sum(1)}
    matched(found, expected | {"attention": attention, "gradient": gradient}, 1e-5)


class OwnChefer(Method):
    """Chefer's rule by N x N matrices."""

    name, label = "own", "Own"

    def step(self, row, layer):
        product = (layer.gradient * layer.attention).clamp(min=0).mean(1)
        return row + torch.einsum("bq,bqk->bk", row, product)


def test_a_method_of_ones_own_takes_matrices():
    found = gmarpp.explain(vit(), images(), ["chefer", OwnChefer()]).maps
    torch.testing.assert_close(found["own"], found["chefer"], rtol=1e-5, atol=1e-8)


class OtherRule(OwnChefer):
    """The same, of a gradient that is propagated by another rule."""

    name, gradient_rule = "other", "other"


def test_methods_of_several_gradient_rules_have_a_pass_each(monkeypatch):
    model, batch = vit(), images()
    methods = ["rollout", "chefer", OtherRule(), "legrad", "gmar_l1"]
    with pytest.raises(ValueError, match="unknown gradient rule 'other': choose from plain"):
        gmarpp.explain(model, batch, methods)
    monkeypatch.setattr(plan, "GRADIENT_RULES", ("plain", "other"))
    for target in (2, [[2, 3]] * 3):
        found = gmarpp.explain(model, batch, methods, target).maps
        assert list(found) == ["rollout", "chefer", "other", "legrad", "gmar_l1"]
        torch.testing.assert_close(found["other"], found["chefer"], rtol=1e-5, atol=1e-8)
        expected = gmarpp.explain(model, batch, "gmar_l1", target).maps["gmar_l1"]
        torch.testing.assert_close(found["gmar_l1"], expected, rtol=1e-5, atol=1e-8)


class GroupedQueries(nn.Module):
    """A network whose four query heads share two key heads."""

    def __init__(self, grouped):
        super().__init__()
        torch.manual_seed(0)
        self.patch, self.head = nn.Conv2d(3, 32, 8, 8), nn.Linear(32, 7)
        self.layers = nn.ModuleList(nn.Linear(32, 64) for _ in range(3))
        self.grouped = grouped

    def forward(self, batch):
        tokens = self.patch(batch).flatten(2).mT
        for layer in self.layers:
            query, key, value = (each.unflatten(2, (-1, 8)) for each in layer(tokens).split([32, 16, 16], dim=2))
            query, key, value = (each.transpose(1, 2) for each in (query, key, value))
            if not self.grouped:
                key, value = key.repeat_interleave(2, dim=1), value.repeat_interleave(2, dim=1)
            attended = F.scaled_dot_product_attention(query, key, value, enable_gqa=self.grouped)
            tokens = tokens + attended.transpose(1, 2).flatten(2)
        return self.head(tokens.mean(1))


@pytest.mark.parametrize("methods", [("gmarpp_l1", "gmar_l2", "chefer"), "rollout"])
def test_grouped_queries_are_explained_as_if_each_head_had_its_keys(methods):
    layout = gmarpp.Architecture(grid=lambda height, width: (height // 8, width // 8), prefix_tokens=0)
    found, expected = (
        gmarpp.explain(GroupedQueries(grouped), images(), methods, 3, architecture=layout).maps
        for grouped in (True, False)
    )
    for name in found:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-8)


@dataclass(frozen=True)
class OwnNorms(Rollout):
    """Heads by the product of two norms, of which it does not say that it takes them."""

    name: str = "own_norms"
    needs_gradient: ClassVar[bool] = True

    def head_weights(self, layer):
        return layer.head_share("gradient_l1") * layer.head_norm("gradient_l2")


NETWORKS = {
    "class token": ({}, {}),
    "class token, recomputed": ({}, {"recompute": True}),
    "average pool, two classes": ({"global_pool": "avg"}, {"target": [[0, 3]]}),
    "without gradients": ({}, {"methods": ["rollout", "attention", "legrad"]}),
    "attention pool": ({"name": "vit_base_patch16_siglip_224"}, {}),
    "no norm": ({}, {"methods": ["gmarpp_sum", "chefer"]}),
    "norms that are not announced": ({}, {"methods": ["gmarpp_l1", OwnNorms()]}),
}


def explained(network, device="cpu"):
    options, call = NETWORKS[network]
    model = vit(**({"depth": 2, "num_heads": 2, "embed_dim": 32} | options)).to(device)
    methods = call.get("methods", (*ALL, OwnChefer()))
    return gmarpp.explain(model, images(1).to(device), **({"methods": methods} | call)).maps


def fused_products(case):
    (shape, mask), arguments = case, {"heads": 4}
    return products(FusedLayer, *tensors(**(arguments | shape)), mask)


@pytest.fixture(scope="module")
def interpreter():
    """Give a process where Triton was imported as an interpreter, so that layers are fused on the CPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        patch.setenv("GMARPP_FUSED", "1")
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            yield process


@needs_triton
def test_the_fused_layer_gives_the_products_of_the_dense_one(interpreter):
    chosen = [({}, MASKS["causal bias"]), (SHAPES["pool"], None), (SHAPES["grouped queries"], None)]
    for case, found in zip(chosen, interpreter.map(fused_products, chosen), strict=True):
        shape, mask = case
        matched(found, products(AttentionLayer, *tensors(**({"heads": 4} | shape)), mask), 1e-5)


@needs_triton
def test_fused_layers_make_the_maps_of_dense_ones(interpreter):
    for network, found in zip(NETWORKS, interpreter.map(explained, NETWORKS), strict=True):
        expected = explained(network)
        for name in expected:
            assert relative_error(found[name], expected[name]) < 1e-5, (network, name)


@cuda
@pytest.mark.cuda
@pytest.mark.parametrize("fused", ["0", "1"])
@pytest.mark.parametrize("network", NETWORKS)
def test_a_gpu_makes_the_maps_of_the_cpu(network, fused, monkeypatch):
    monkeypatch.setenv("GMARPP_FUSED", fused)
    found, expected = explained(network, "cuda"), explained(network)
    for name in expected:
        assert relative_error(found[name].cpu(), expected[name]) < 1e-5, name


@cuda
@pytest.mark.cuda
def test_a_gpu_keeps_no_matrices():
    model, batch = vit(img_size=256, patch_size=8, depth=3).cuda(), images(4, (256, 256)).cuda()
    gmarpp.explain(model, batch, ALL)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    gmarpp.explain(model, batch, ALL)
    matrix = 4 * 3 * 1025 * 1025 * 4  # bytes of one layer's attention
    assert torch.cuda.max_memory_allocated() - before < matrix
