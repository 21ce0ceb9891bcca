"""Agreement of every metric with independent code, over edge cases and all patch grids from 7 to 37 patches a side.

    python benchmarks/metric_agreement.py [--rounds 1] [--seed 0]

Draws maps (random, constant, of a tiny and of a huge range, tied, a single peak, a ramp whose pixels equal its mean,
one patch), masks (random, empty, full, one pixel; of sizes that the grid divides, does not divide or exceeds), and
scores (probabilities, 0, 1, logits, NaN), computes every metric by `gmarpp` in float32 and by NumPy, SciPy and
scikit-learn in float64, and prints a table in Markdown: cases, and the largest deviation relative to max(1, value). The
deviation is infinite for a value that only one of the two defines, or a map with NaN that is accepted.
"""

import argparse
import math
from collections import defaultdict
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy.integrate import trapezoid
from scipy.stats import rankdata, spearmanr
from score_table import markdown_table
from sklearn.metrics import average_precision_score, jaccard_score

from gmarpp.maps import minmax, normalize_map
from gmarpp.metrics import functional
from gmarpp.perturbation import rank_patches

GRIDS = tuple(range(7, 38))
Array = npt.NDArray[Any]
Generator = np.random.Generator


def draw_maps(generator: Generator, height: int, width: int) -> dict[str, Array]:
    """Draw one map (h, w), float32, of every kind."""
    shape = (height, width)
    offset = generator.normal()
    peak = np.zeros(shape)
    peak[generator.integers(height), generator.integers(width)] = 1
    maps = {
        "random": generator.normal(size=shape),
        "positive": generator.exponential(size=shape) ** 3,
        "constant": np.full(shape, offset),
        "zero": np.zeros(shape),
        "a few ulp": np.float32(offset) * (1 + 2.0**-23 * generator.integers(0, 4, shape)),
        "tiny": 1e-38 * generator.random(shape),
        "huge": 3e38 * generator.uniform(-1, 1, shape),
        "tied": generator.integers(0, 3, shape),
        "peak": peak,
        "ramp": np.add.outer(np.arange(height), np.arange(width)),
    }
    return {kind: values.astype(np.float32) for kind, values in maps.items()}


def draw_masks(generator: Generator, height: int, width: int) -> Iterator[Array]:
    """Draw masks of sizes that the grid divides, does not divide and exceeds."""
    for size in ((height * 4, width * 4), (height * 3 + 2, width * 5 - 3), (5, 6)):
        one = np.zeros(size, dtype=bool)
        one[generator.integers(size[0]), generator.integers(size[1])] = True
        yield from (generator.random(size) < generator.random(), one, np.zeros_like(one), np.ones_like(one))


def naive_minmax(values: Array) -> Array:
    """Scale a map to [0, 1]; a constant one is 0."""
    values = values.astype(np.float64)
    span = values.max() - values.min()
    return (values - values.min()) / span if span else np.zeros_like(values)


def naive_upsampling(values: Array, size: tuple[int, int]) -> Array:
    """Interpolate linearly between the centers of the patches, and continue the border constantly."""
    for axis, length in enumerate(size):
        cells = values.shape[axis]
        middle = (np.arange(length) + 0.5) * cells / length - 0.5
        values = np.apply_along_axis(lambda line, at=middle, n=cells: np.interp(at, np.arange(n), line), axis, values)
    return values


def naive_localization(values: Array, mask: Array) -> dict[str, float]:
    """Compute all localization metrics of one map and mask."""
    scaled = naive_upsampling(naive_minmax(values), mask.shape)
    positive = naive_upsampling(naive_minmax(np.maximum(values, 0)), mask.shape)
    lit = scaled > scaled.mean() + 1e-10
    if not mask.any():
        return dict.fromkeys(("pointing_game", "energy_inside", "iou", "pixel_accuracy", "average_precision"), math.nan)
    return {
        "pointing_game": float(mask.ravel()[np.flatnonzero(scaled >= scaled.max() - 1e-10)[0]]),
        "energy_inside": positive[mask].sum() / positive.sum() if positive.any() else 0.0,
        "iou": jaccard_score(mask.ravel(), lit.ravel(), zero_division=0.0),
        "pixel_accuracy": (lit == mask).mean(),
        "average_precision": average_precision_score(mask.ravel(), scaled.ravel().round(10)),
    }


def naive_gini(values: Array) -> float:
    """Compute half the relative mean difference of absolute values, from their ranks."""
    values = np.abs(values.astype(np.float64)).ravel()
    if not values.any():
        return 0.0
    ranks = rankdata(values, method="ordinal")
    return float(2 * (ranks * (values / values.sum())).sum() / values.size - (values.size + 1) / values.size)


def naive_kept_region(full: float, kept: float) -> dict[str, float]:
    """Compute Average Drop, Increase and Gain of one image; NaN where a score or the unit defines none."""
    if math.isnan(full) or math.isnan(kept):
        return dict.fromkeys(("average_drop", "average_increase", "average_gain"), math.nan)
    drop = math.nan if full < 0 else 0.0 if full == 0 else 100 * max(full - kept, 0) / full
    gain = math.nan if full > 1 else 0.0 if full == 1 else 100 * max(kept - full, 0) / (1 - full)
    return {"average_drop": drop, "average_increase": 100.0 * (kept > full), "average_gain": gain}


def draw_scores(generator: Generator, count: int) -> Array:
    """Draw scores: probabilities, tiny ones, ones near 1, exactly 0 and 1, logits, and NaN."""
    kinds = (
        generator.random(count),
        generator.random(count) * 1e-30,
        1 - generator.random(count) * 1e-6,
        generator.integers(0, 2, count).astype(float),
        generator.normal(0, 10, count),
        np.full(count, np.nan),
    )
    return np.choose(generator.integers(0, len(kinds), count), kinds).astype(np.float32)


class Table:
    """Cases and the largest deviation, per metric."""

    def __init__(self) -> None:
        self.cases: dict[str, int] = defaultdict(int)
        self.deviation: dict[str, float] = defaultdict(float)

    def add(self, metric: str, found: Any, expected: Any) -> None:
        """Compare values of one metric, scalars or arrays, each a case."""
        found, expected = np.atleast_1d(np.asarray(found, np.float64)), np.atleast_1d(np.asarray(expected, np.float64))
        both = np.isnan(found) & np.isnan(expected)
        deviation = np.where(both, 0, np.abs(found - expected) / np.maximum(1, np.abs(expected)))
        self.cases[metric] += found.size
        self.deviation[metric] = max(
            self.deviation[metric], float(np.where(np.isnan(deviation), np.inf, deviation).max())
        )


def compare_maps(table: Table, generator: Generator, grid: tuple[int, int]) -> None:
    """Compare what is computed from maps, and from maps and masks, on one patch grid."""
    maps = draw_maps(generator, *grid)
    batch = torch.from_numpy(np.stack(list(maps.values())))
    each = list(maps.values())
    table.add("minmax", minmax(batch).flatten(1).amax(1), [naive_minmax(values).max() for values in each])
    for position, values in enumerate(each):
        table.add("minmax", minmax(batch)[position].ravel(), naive_minmax(values).ravel())
        table.add("normalize_map", normalize_map(values).ravel(), naive_minmax(values).ravel())
        order = np.argsort(rank_patches(batch[position]).numpy())
        table.add("rank_patches", order, np.argsort(-values.ravel().astype(np.float64), kind="stable"))
    table.add("sparseness", functional.sparseness(batch, "none"), [naive_gini(values) for values in each])
    expected = [
        spearmanr(a.ravel(), b.ravel()).statistic if np.ptp(a.astype(float)) and np.ptp(b.astype(float)) else 0.0
        for a, b in pairwise(each)
    ]
    table.add("rank_correlation", functional.rank_correlation(batch[:-1], batch[1:]), expected)
    for mask in draw_masks(generator, *grid):
        masks = torch.from_numpy(mask).expand(len(batch), *mask.shape)
        naive = [naive_localization(values, mask) for values in each]
        for metric in naive[0]:
            found = getattr(functional, metric)(batch, masks, reduction="none")
            table.add(metric, found, [values[metric] for values in naive])
    broken = batch.clone()
    broken[0, 0, 0] = generator.choice([np.nan, np.inf, -np.inf])
    for metric in ("sparseness", "pointing_game", "energy_inside", "iou", "pixel_accuracy", "average_precision"):
        arguments = (broken,) if metric == "sparseness" else (broken, torch.ones(len(broken), 8, 8))
        try:
            getattr(functional, metric)(*arguments)
        except ValueError:
            table.add(metric, 0, 0)
        else:
            table.add(metric, 0, math.nan)


def compare_scores(table: Table, generator: Generator, count: int = 64) -> None:
    """Compare what is computed from scores."""
    full, kept = draw_scores(generator, count), draw_scores(generator, count)
    same = generator.random(count) < 0.1
    kept[same] = full[same]
    naive = [naive_kept_region(float(a), float(b)) for a, b in zip(full, kept, strict=True)]
    for metric in naive[0]:
        found = getattr(functional, metric)(torch.from_numpy(full), torch.from_numpy(kept), reduction="none")
        table.add(metric, found, [values[metric] for values in naive])

    steps = int(generator.integers(1, 29))
    fractions = np.sort(np.append(generator.random(steps - 1), (0, 1))).astype(np.float32)
    first, second = (draw_scores(generator, 16 * (steps + 1)).reshape(16, steps + 1) for _ in range(2))
    for curves in (first, second):
        curves[:8] = generator.random((8, steps + 1))
    areas = [trapezoid(curves.astype(np.float64), fractions.astype(np.float64), axis=1) for curves in (first, second)]
    at, insertion, deletion = (torch.from_numpy(values) for values in (fractions, first, second))
    table.add("insertion_auc", functional.insertion_auc(at, insertion, "none"), areas[0])
    table.add("deletion_auc", functional.deletion_auc(at, deletion, "none"), areas[1])
    gap = functional.insertion_deletion_gap(at, insertion, deletion, "none")
    table.add("insertion_deletion_gap", gap, areas[0] - areas[1])
    most, least = first.astype(np.float64).mean(1), second.astype(np.float64).mean(1)
    table.add("road", functional.road(insertion, deletion, reduction="none"), (least - most) / 2)
    table.add("road", functional.road(insertion, deletion, "most_relevant_first", "none"), most)
    table.add("road", functional.road(insertion, deletion, "least_relevant_first", "none"), least)


def compare_boxes(table: Table, generator: Generator, count: int = 16) -> None:
    """Compare boxes with the masks that they become, pixel by pixel."""
    height, width = (int(side) for side in generator.integers(1, 40, 2))
    boxes = generator.uniform(-4, 44, (count, 4)).round(int(generator.integers(0, 3))).astype(np.float32)
    boxes[0, generator.integers(4)] = np.nan
    y, x = np.mgrid[:height, :width] + 0.5
    found = functional.boxes_to_masks(torch.from_numpy(boxes), (height, width))
    for mask, (x0, y0, x1, y1) in zip(found, boxes, strict=True):
        table.add("boxes_to_masks", mask.ravel(), ((x0 <= x) & (x < x1) & (y0 <= y) & (y < y1)).ravel())


def compare(rounds: int, seed: int, grids: tuple[int, ...] = GRIDS) -> Table:
    """Compare everything on square grids, on oblong ones and on a single patch."""
    table, generator = Table(), np.random.default_rng(seed)
    for _ in range(rounds):
        for side in grids:
            other = int(generator.choice(grids))
            for grid in ((side, side), (side, other)):
                compare_maps(table, generator, grid)
            compare_scores(table, generator)
            compare_boxes(table, generator)
        compare_maps(table, generator, (1, 1))
    return table


def main() -> None:
    """Compare and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    table = compare(options.rounds, options.seed)
    rows = [(metric, f"{cases:,}", f"{table.deviation[metric]:.1e}") for metric, cases in table.cases.items()]
    print(markdown_table(("metric", "cases", "largest deviation"), rows))


if __name__ == "__main__":
    main()
