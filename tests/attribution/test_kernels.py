"""The kernels compiled for a GPU, which needs none: what the interpreter cannot tell."""

import importlib.util

import pytest
import torch

from gmarpp.attribution import fused

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or torch.cuda.is_available(),
    reason="needs Triton; on a GPU the kernels themselves run",
)


@pytest.fixture
def compiled(monkeypatch, tmp_path):
    """Give a function that compiles the kernels for a layer's shape as a call does, for an H100 that is not here."""
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

    def compile_layer(shape, dtype):
        results.clear()
        layer, rows = [torch.ones(shape, dtype=dtype)] * 4, torch.ones(*shape[:2], 2, shape[2])
        found = fused.statistics(*layer, scale=0.125)
        fused.carry(*layer, found, attention_rows=rows, product_rows=rows, scale=0.125)
        return tuple(results)

    return compile_layer


def test_kernels_compile_once_for_all_sizes(compiled):
    first = compiled((1, 2, 197, 64), torch.bfloat16)
    assert all(kernel.metadata.shared <= 227 << 10 for kernel in first)
    assert compiled((3, 4, 1370, 64), torch.bfloat16) == first


def test_tf32_only_where_torch_allows_it(compiled):
    assert "tf32" not in compiled((1, 1, 16, 16), torch.float32)[0].asm["ptx"]
    torch.set_float32_matmul_precision("high")
    try:
        assert "tf32" in compiled((1, 1, 16, 16), torch.float32)[0].asm["ptx"]
    finally:
        torch.set_float32_matmul_precision("highest")
