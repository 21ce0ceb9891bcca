"""Time of the fused layer's kernels for layers of real networks, compared with fused attention itself.

    python benchmarks/fused.py --device cuda

On a CPU the kernels run in Triton's interpreter, which only shows that this script works:
`TRITON_INTERPRET=1 python benchmarks/fused.py --device cpu --layers 1,2,20,16 --repeats 1`.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from measure import add_device, machine, synchronize

from gmarpp.attribution import fused

LAYERS = {"ViT-L/16, 224": "128,16,197,64", "ViT-L/14, 518": "8,16,1370,64", "SO400M/14, 384": "32,16,729,72"}
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def milliseconds(call: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Return the median time of a call, after one that compiles."""
    call()
    times = []
    for _ in range(repeats):
        synchronize(device)
        start = time.perf_counter()
        call()
        synchronize(device)
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times)


def row(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, repeats: int) -> list[float]:
    """Return milliseconds of fused attention, the statistics, and the rows of three and four methods."""
    batch, heads, tokens, size = shape
    packed = torch.randn(batch, tokens, 4, heads, size, device=device).to(dtype)
    query, key, value, outer = packed.permute(2, 0, 3, 1, 4)
    found = fused.statistics(query, key, value, outer, scale=size**-0.5)
    rows = [torch.rand(batch, count, heads, tokens, device=device).transpose(1, 2) for count in (3, 4)]

    def carry() -> object:
        return fused.carry(
            query, key, value, outer, found, attention_rows=rows[0], product_rows=rows[1], scale=size**-0.5
        )

    return [
        milliseconds(lambda: F.scaled_dot_product_attention(query, key, value), device, repeats),
        milliseconds(lambda: fused.statistics(query, key, value, outer, scale=size**-0.5), device, repeats),
        milliseconds(carry, device, repeats),
    ]


def main() -> None:
    """Print a table of all layers and precisions."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_device(parser, default="cuda")
    parser.add_argument("--layers", nargs="+", default=[], help="batch,heads,tokens,d instead of real networks")
    parser.add_argument("--repeats", type=int, default=20)
    options = parser.parse_args()
    layers = {each: each for each in options.layers} or LAYERS
    print(machine(options.device))
    print("| layer | precision | attention forward, ms | statistics, ms | carry of 7 rows, ms |\n|---|---|---|---|---|")
    for name, shape in layers.items():
        for precision, dtype in DTYPES.items():
            times = row(tuple(map(int, shape.split(","))), dtype, options.device, options.repeats)
            print(f"| {name} | {precision} |", " | ".join(f"{each:.3f}" for each in times), "|")


if __name__ == "__main__":
    main()
