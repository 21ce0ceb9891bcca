"""The kernels compiled for a GPU, which needs none: what the interpreter cannot tell."""

import importlib.util
import re

import pytest
import torch

from gmarpp.attribution import fused

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or torch.cuda.is_available(),
    reason="needs Triton; on a GPU the kernels themselves run",
)


@pytest.fixture
def compiled(monkeypatch, tmp_path):
    """Give the list of kernels that calls compile, for an H100 that is not here, instead of running them."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver

    class Absent:
        get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
        get_current_device = staticmethod(lambda: 0)
        get_current_stream = staticmethod(lambda _: 0)

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(driver, "_active", Absent())
    monkeypatch.setattr(fused, "_shared_memory", lambda _: 233472)
    results = []
    for kernel in (fused.kernels.statistics_kernel, fused.kernels.carry_kernel):

        def compile_only(*args, run=kernel.run, **kwargs):
            results.append(run(*args, **{**kwargs, "warmup": True}))

        monkeypatch.setattr(kernel, "run", compile_only)

    return results


@pytest.mark.parametrize("sizes", [((1, 2, 197), (3, 4, 250)), ((1, 2, 577), (3, 4, 1370))], ids=["short", "long"])
def test_kernels_compile_once_for_all_sizes(compiled, sizes):
    for batch, heads, tokens in sizes:
        layer = [torch.ones(batch, heads, tokens, 64, dtype=torch.bfloat16)] * 4
        rows = torch.ones(batch, heads, 2, tokens)
        found = fused.statistics(*layer, scale=0.125)
        fused.carry(*layer, found, attention_rows=rows, product_rows=rows, scale=0.125)
    assert all(kernel.metadata.shared <= 227 << 10 for kernel in compiled)
    assert compiled[2:] == compiled[:2]


def test_one_product_of_tf32_where_torch_allows_it_and_three_elsewhere(compiled):
    layer = [torch.ones(1, 1, 16, 16)] * 4
    fused.statistics(*layer, scale=0.25)
    torch.set_float32_matmul_precision("high")
    try:
        fused.statistics(*layer, scale=0.25)
    finally:
        torch.set_float32_matmul_precision("highest")
    three, one = (len(re.findall(r"mma\S*\.tf32", kernel.asm["ptx"])) for kernel in compiled)
    assert three == 3 * one > 0
