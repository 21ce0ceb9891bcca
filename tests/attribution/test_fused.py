"""The fused layer against matrices written out in float64, by Triton's interpreter where there is no GPU."""

import importlib.util
import math
import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch
from pooled_networks import pvt
from test_families import images, relative_error
from test_pooled_queries import timm_hiera
from test_transport import TARGET, timm_swin

import gmarpp
from gmarpp.attribution import fused

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")


class Layers:
    """The module's functions on the GPU, or else in a process where Triton was imported as an interpreter."""

    def __init__(self, device, interpreter):
        self.device = device
        self.interpreter = interpreter

    def statistics(self, *args, **kwargs):
        return self._call(fused.statistics, args, kwargs)

    def carry(self, *args, **kwargs):
        return self._call(fused.carry, args, kwargs)

    def _call(self, function, args, kwargs):
        if self.interpreter is None:
            return function(*args, **kwargs)
        return self.interpreter.submit(function, *args, **kwargs).result()


@pytest.fixture(scope="module")
def layers():
    if torch.cuda.is_available():
        yield Layers(torch.device("cuda"), None)
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        patch.setenv("GMARPP_FUSED", "1")
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as interpreter:
            assert interpreter.submit(fused.available, torch.device("cpu")).result()
            yield Layers(torch.device("cpu"), interpreter)


def matrices(query, key, value, outer, mask=None, scale=1.0, gradient_scale=1.0):
    """Give the scores, A and G of shape (B, H, Q, N), float64."""
    query, key, value, outer = (each.double() for each in (query, key, value, outer))
    key, value = (each.repeat_interleave(query.shape[1] // each.shape[1], dim=1) for each in (key, value))
    scores = query @ key.transpose(-2, -1) * scale
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, float("-inf"))
    elif mask is not None:
        scores = scores + mask.double()
    attends = scores > float("-inf")
    exponentials = (scores - scores.amax(-1, keepdim=True).clamp(min=-1e300)).exp()
    attention = exponentials / exponentials.sum(-1, keepdim=True).clamp(min=1e-300)
    return scores, attention, outer @ value.transpose(-2, -1) / gradient_scale * attends


def assert_near(actual, expected, tolerance=1e-5):
    """To the tolerance, relative to the largest finite value."""
    assert actual.dtype == torch.float32
    largest = expected[expected.isfinite()].abs().max().item()
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=tolerance * largest)


def log_sums(scores):
    """In units of log 2; inf where nothing is attended to."""
    sums = scores.logsumexp(-1) / math.log(2)
    return sums.where(sums > -math.inf, math.inf)


def check(layers, query, key, value, outer, rows=(1, 2, 1), **options):
    """Compare everything that is given for a layer."""
    query, key, value, outer = (each.to(layers.device) for each in (query, key, value, outer))
    if options.get("mask") is not None:
        options["mask"] = options["mask"].to(layers.device)
    scores, attention, gradient = matrices(query, key, value, outer, **options)
    positive = gradient.clamp(min=0)
    found = layers.statistics(query, key, value, outer, **options)
    assert_near(found.log_sums, log_sums(scores))
    gradient_l1, positive_l1, gradient_l2, positive_l2 = found.norms
    assert_near(gradient_l1, gradient.abs().sum((2, 3)))
    assert_near(gradient_l2, gradient.pow(2).sum((2, 3)).sqrt())
    assert_near(positive_l1, positive.sum((2, 3)))
    assert_near(positive_l2, positive.pow(2).sum((2, 3)).sqrt())
    assert_near(found.product_rows, (positive * attention).sum(-1))
    given = [torch.rand(*query.shape[:2], count, query.shape[2], device=layers.device) for count in rows]
    names = ("attention_rows", "product_rows", "gradient_rows")
    carried = layers.carry(query, key, value, outer, found, **dict(zip(names, given, strict=True)), **options)
    # What comes of half-precision scores is multiplied with ten bits.
    is_half = query.dtype in (torch.float16, torch.bfloat16)
    for each, left, right in zip(carried, given, (attention, positive * attention, positive), strict=True):
        assert_near(each, (left.double() @ right).sum(1), 1e-3 if is_half else 1e-5)


def layer(batch=1, heads=2, queries=20, keys=20, size=16, key_heads=None, value_size=None, dtype=torch.float32):
    torch.manual_seed(0)
    key_heads, value_size = key_heads or heads, value_size or size
    return (
        torch.randn(batch, heads, queries, size).to(dtype),
        torch.randn(batch, key_heads, keys, size).to(dtype),
        torch.randn(batch, key_heads, keys, value_size).to(dtype),
        torch.randn(batch, heads, queries, value_size).to(dtype),
    )


@pytest.mark.parametrize(
    "shape",
    [
        {"batch": 2, "size": 16},
        {"queries": 1, "keys": 35},  # an attention pool
        {"queries": 33, "keys": 3},
        {"heads": 6, "key_heads": 2, "queries": 5, "keys": 5},  # three query heads share a key head
        {"size": 72, "value_size": 24},
        {"size": 8, "value_size": 80},
        {"heads": 1, "size": 88},
        {"heads": 1, "size": 256, "queries": 5, "keys": 17},
    ],
    ids=str,
)
def test_shapes(layers, shape):
    check(layers, *layer(**shape), scale=0.2, gradient_scale=1024.0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_precisions(layers, dtype):
    check(layers, *layer(dtype=dtype), scale=0.25)


def test_an_outer_gradient_of_another_precision(layers):
    query, key, value, outer = layer(dtype=torch.float16)
    check(layers, query, key, value, outer.float() * 1e-6, scale=0.25)


def test_norms_that_are_wanted_come_in_their_order(layers):
    query, key, value, outer = (each.to(layers.device) for each in layer(batch=2))
    whole = layers.statistics(query, key, value, outer, scale=0.25, gradient_scale=4.0)
    for places in ((0,), (3,), (1, 2), (0, 1, 3), ()):
        wanted = [fused.NORMS[place] for place in reversed(places)]
        found = layers.statistics(query, key, value, outer, scale=0.25, gradient_scale=4.0, norms=wanted)
        assert torch.equal(found.norms, whole.norms[list(places)])
        assert torch.equal(found.product_rows, whole.product_rows)


def test_more_rows_than_one_matrix_unit_takes(layers):
    check(layers, *layer(heads=1, queries=5, keys=5), rows=(1, 33, 16), scale=0.25)


def test_scores_whose_exponential_overflows(layers):
    query, key, value, _ = (each.to(layers.device) for each in layer(heads=1))
    scores, attention, _ = matrices(query, key, value, query, scale=50.0)
    assert scores.amax(-1).min() > 89
    found = layers.statistics(query, key, value, None, scale=50.0)
    assert_near(found.log_sums, log_sums(scores))
    rows = torch.rand(1, 1, 1, 20, device=layers.device)
    carried = layers.carry(query, key, value, None, found, attention_rows=rows, scale=50.0)[0]
    # Scores of hundreds have but five digits behind the point.
    assert_near(carried, (rows.double() @ attention).sum(1), tolerance=1e-4)


def boolean_mask(*shape):
    mask = torch.rand(shape) > 0.4
    mask[..., 3, :] = False  # attends to nothing
    mask[..., 4, :16] = False  # attends to nothing in the first tile
    return mask


def additive_mask(*shape):
    return torch.randn(shape).masked_fill(~boolean_mask(*shape), float("-inf"))


@pytest.mark.parametrize(
    "mask",
    [
        boolean_mask(20, 20),
        boolean_mask(2, 1, 20, 20),
        torch.arange(20) < 11,  # for all queries alike
        (torch.arange(20) % 3 > 0)[:, None].expand(20, 20),  # queries that attend to everything or nothing
        additive_mask(1, 2, 20, 20),
        additive_mask(20, 20).transpose(0, 1).contiguous().transpose(0, 1),
        additive_mask(2, 20, 20).double(),
        torch.full((20, 20), torch.finfo(torch.float32).min).tril(-1),
    ],
    ids=["bool", "bool by image", "bool by key", "bool by query", "bias by head", "strided bias", "float64", "finite"],
)
def test_masks(layers, mask):
    check(layers, *layer(batch=2), mask=mask, scale=0.25)


@pytest.mark.parametrize("scale", [-0.25, 0.0])
@pytest.mark.parametrize("mask", [None, torch.arange(20) < 13])
def test_scales_that_are_not_positive(layers, scale, mask):
    check(layers, *layer(heads=1), scale=scale, mask=None if mask is None else mask.expand(20, 20))


def test_strides_of_every_kind(layers):
    torch.manual_seed(0)
    packed = torch.randn(2, 20, 3, 2, 18)[..., 1:17]  # tokens, then query, key and value, then heads; not aligned
    query, key, value = packed.permute(2, 0, 3, 1, 4)
    strided = torch.randn(2, 2, 16, 20).transpose(-2, -1)
    check(layers, query, key, value, strided, scale=0.25)
    check(layers, query.flip(0), key[:1].expand(2, -1, -1, -1), value, torch.ones(()).expand(2, 2, 20, 16), scale=0.25)


def far_apart(path):
    """Attend to keys of two images with more than 2³¹ entries between them, in a file that is all holes."""
    storage = torch.from_file(str(path), shared=True, size=2**31 + 2**10, dtype=torch.float16)
    query, key, value, outer = layer(batch=2, heads=1, queries=3, keys=3, dtype=torch.float16)
    far = storage.as_strided(key.shape, (2**31 + 2**9, 48, 16, 1)).copy_(key)
    found = fused.statistics(query, far, value, outer, scale=0.25)
    return found.log_sums - fused.statistics(query, key, value, outer, scale=0.25).log_sums


def test_strides_of_rows(layers):
    query, key, value, outer = (each.to(layers.device) for each in layer(batch=2))
    _, attention, gradient = matrices(query, key, value, outer, scale=0.25)
    found = layers.statistics(query, key, value, outer, scale=0.25)
    by_method = torch.rand(2, 3, 2, 20, device=layers.device).transpose(1, 2)
    strided = torch.rand(2, 2, 20, 3, device=layers.device, dtype=torch.float64).transpose(2, 3)
    carried = layers.carry(query, key, value, outer, found, attention_rows=by_method, gradient_rows=strided, scale=0.25)
    assert_near(carried[0], (by_method.double() @ attention).sum(1))
    assert_near(carried[2], (strided @ gradient.clamp(min=0)).sum(1))


def test_offsets_beyond_32_bits(layers, tmp_path):
    if layers.interpreter is None:
        pytest.skip("checked in the interpreter")
    assert (layers.interpreter.submit(far_apart, tmp_path / "holes").result() == 0).all()


def test_rollout_needs_no_gradient(layers):
    query, key, value, outer = (each.to(layers.device) for each in layer())
    scores, attention, _ = matrices(query, key, value, outer, scale=0.25)
    found = layers.statistics(query, key, value, None, scale=0.25)
    assert_near(found.log_sums, log_sums(scores))
    # What asks for a gradient that there is not must not get a number.
    assert found.norms.shape == (4, 1, 2)
    assert found.norms.isnan().all()
    assert found.product_rows.shape == (1, 2, 20)
    assert found.product_rows.isnan().all()
    rows = torch.rand(1, 2, 3, 20, device=layers.device)
    carried = layers.carry(query, key, value, None, found, attention_rows=rows, scale=0.25)
    assert_near(carried[0], (rows.double() @ attention).sum(1))
    assert carried[1:] == (None, None)


def test_local_gradient_of_the_first_queries(layers):
    mask = boolean_mask(20, 20)
    query, key, value, outer = (each[:, :, :5] if i in (0, 3) else each for i, each in enumerate(layer()))
    _, _, gradient = matrices(query, key, value, outer, mask=mask[:5], gradient_scale=8.0)
    arguments = [each.to(layers.device) for each in (query, key, value, outer)]
    carried = layers.carry(
        *arguments,
        None,
        gradient_rows=torch.ones(1, 2, 1, 5, device=layers.device),
        mask=mask[:5].to(layers.device),
        scale=0.25,
        gradient_scale=8.0,
    )
    assert carried[:2] == (None, None)
    assert_near(carried[2].cpu(), gradient.clamp(min=0).sum((1, 2))[:, None])


def test_not_a_number_stays_one(layers):
    query, key, value, outer = (each.to(layers.device) for each in layer(batch=2, queries=5, keys=5))
    value[0, 0, 2, 1] = float("nan")
    found = layers.statistics(query, key, value, outer, scale=0.25)
    for each in found.norms:
        assert each.isnan().tolist() == [[True, False], [False, False]]
    assert found.product_rows.isnan().all(-1).tolist() == [[True, False], [False, False]]
    rows = torch.ones(2, 2, 1, 5, device=layers.device)
    carried = layers.carry(query, key, value, outer, found, product_rows=rows, gradient_rows=rows, scale=0.25)
    for each in carried[1:]:
        assert each.isnan()[:, 0].tolist() == [[False, False, True, False, False], [False] * 5]
    query[1, 1, 3, 0] = float("nan")
    found = layers.statistics(query, key, value.nan_to_num(), outer, scale=0.25)
    assert found.log_sums.isnan().nonzero().tolist() == [[1, 1, 3]]
    assert found.product_rows.isnan().nonzero().tolist() == [[1, 1, 3]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"key": torch.ones(1, 2, 20, 8)}, r"key: expected shape \(1, 2, 20, 16\), got \(1, 2, 20, 8\)"),
        ({"outer": torch.ones(1, 2, 5, 16)}, r"outer: expected shape \(1, 2, 20, 16\), got \(1, 2, 5, 16\)"),
        ({"mask": torch.ones(3, 20)}, r"mask: expected a shape that expands to \(1, 2, 20, 20\), got \(3, 20\)"),
        ({"outer": None}, "product_rows: expected the output's gradient, got outer=None"),
        (
            {"statistics": fused.Statistics(*[torch.ones(1, 2, 5)] * 3)},
            r"statistics: expected those of queries \(1, 2, 20\), got \(1, 2, 5\)",
        ),
        ({"statistics": None}, "product_rows: expected the layer's statistics, got None"),
        ({"product_rows": None}, "expected at least one of attention_rows, product_rows, gradient_rows, got none"),
        ({"product_rows": torch.ones(1, 2, 20)}, r"product_rows: expected shape \(1, 2, M, 20\), got \(1, 2, 20\)"),
    ],
)
def test_what_does_not_fit_is_an_error(change, message):
    query, key, value, outer = layer()
    arguments = {"query": query, "key": key, "value": value, "outer": outer, "product_rows": torch.ones(1, 2, 1, 20)}
    given = fused.Statistics(*[torch.ones(1, 2, 20)] * 3)
    with pytest.raises(ValueError, match=message):
        fused.carry(**{**arguments, "statistics": given, "scale": 1.0, **change})


def test_heads_that_do_not_fit_are_an_error():
    with pytest.raises(ValueError, match="heads of at most 256 channels, got 512: set GMARPP_FUSED=0"):
        fused.statistics(*layer(size=512), scale=1.0)
    with pytest.raises(ValueError, match="expected query heads in equal groups for 3 key heads, got 4"):
        fused.statistics(*layer(heads=4, key_heads=3), scale=1.0)


def test_where_it_is_available(monkeypatch):
    monkeypatch.delenv("GMARPP_FUSED", raising=False)
    assert fused.available(torch.device("cuda"))
    assert not fused.available(torch.device("cpu"))
    assert not fused.available(torch.device("meta"))
    monkeypatch.setenv("GMARPP_FUSED", "1")
    assert not fused.available(torch.device("cpu"))
    monkeypatch.setenv("GMARPP_FUSED", "0")
    assert not fused.available(torch.device("cuda"))


def test_it_can_be_imported_without_triton(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    specification = importlib.util.spec_from_file_location("fused_without_triton", fused.__file__)
    alone = importlib.util.module_from_spec(specification)
    monkeypatch.setitem(sys.modules, "fused_without_triton", alone)
    specification.loader.exec_module(alone)
    assert not alone.available(torch.device("cuda"))


@needs_cuda
@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(4, 16, 197, 64), (1, 6, 1370, 64), (2, 4, 257, 80), (1, 2, 300, 256)], ids=str)
def test_layers_of_real_networks(layers, shape, dtype):
    batch, heads, tokens, size = shape
    check(layers, *layer(batch, heads, tokens, tokens, size, dtype=dtype), rows=(3, 4, 1), scale=size**-0.5)


@needs_cuda
@pytest.mark.cuda
def test_the_sum_over_heads_does_not_vary(layers):
    query, key, value, outer = (each.cuda() for each in layer(4, 16, 197, 197, 64))
    found = layers.statistics(query, key, value, outer, scale=0.125)
    rows = torch.rand(4, 16, 3, 197, device="cuda")
    first, again = (layers.carry(query, key, value, outer, found, product_rows=rows, scale=0.125)[1] for _ in range(2))
    assert (first == again).all()


# A Swin Transformer's second block is shifted; its windows divide its tokens, or not.
IN_STAGES = {
    "windows": (lambda: timm_swin(32, 4, depths=(2, 1)), (32, 32)),
    "windows with padding": (lambda: timm_swin(32, 3, depths=(2, 1)), (32, 32)),
    "fewer keys": (pvt, (36, 44)),
}


def maps_in_stages(device, name):
    make, size = IN_STAGES[name]
    methods = ("gmarpp_l1", "gmarpp_l2", "gmar_l1", "rollout", "chefer", "gmarpp_balanced")
    return gmarpp.explain(make().to(device), images(size).to(device), methods, TARGET.to(device)).maps


@pytest.mark.parametrize("name", IN_STAGES)
def test_layers_that_do_not_attend_to_all_tokens(layers, name):
    if layers.interpreter is None:
        found = maps_in_stages(layers.device, name)
    else:
        found = layers.interpreter.submit(maps_in_stages, layers.device, name).result()
    for method, maps in maps_in_stages(torch.device("cpu"), name).items():
        assert relative_error(found[method].cpu(), maps) < 1e-4, method


def maps_of_pooled_queries(device):
    """Give the maps of a Hiera."""
    model = timm_hiera((16, 32), stages=(1, 1), q_pool=1, mask_unit_attn=(True, False)).to(device)
    methods = ("gmarpp_l1", "rollout", "gmarpp_balanced")
    return gmarpp.explain(model, images((16, 32)).to(device), methods, TARGET.to(device)).maps


def test_pooled_queries(layers):
    if layers.interpreter is None:
        found = maps_of_pooled_queries(layers.device)
    else:
        found = layers.interpreter.submit(maps_of_pooled_queries, layers.device).result()
    for method, maps in maps_of_pooled_queries(torch.device("cpu")).items():
        assert relative_error(found[method].cpu(), maps) < 1e-4, method
