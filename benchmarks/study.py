"""What would make GMAR++ more faithful? Variants compared on one part of the images, the best confirmed on another.

    python benchmarks/study.py --data TinyImageNet --data.root data --output results/study

Protocol, fixed before any variant was scored on these images:

- The class explained is the predicted one. A first image of every class comes first, then a second one, and so on; the
  first `development` of them choose, the next `confirmation` confirm. No image is in both.
- Criterion: insertion AUC minus deletion AUC, probabilities, 8 curve steps, blurred patches as baseline, mean over the
  images. The same under `drop`, where removed tokens leave the sequence, is reported beside it and chooses nothing.
- The winner is the variant with the highest criterion on the development images among those that cost what every
  method of gmarpp costs: one forward and one backward pass. Smoothing averages four passes; it is reported only.
- The winner is worth shipping if on the confirmation images its criterion is higher than that of GMAR++ (L1), GMAR++
  (L2) and Chefer under blur and under `drop`, each by a paired 95 % bootstrap interval that excludes zero, and if no
  interval of the five faithfulness metrics shows it worse than one of the three. Localization is reported only.

Decided after the first 40 development images:

- The variants that combine the row-wise rule with the sum over heads were added, since this sum helped; twelve others
  that were far worse, or no different, were dropped.
- Of all variants, scored on the first `screening` of the development images, the five best and the published methods
  go on to the rest of them.
- The winner's rule is confirmed with the plain logit, too, which fits into the pass that all methods share.

Writes `scores.csv` (a row per image, baseline and variant; an interrupted run continues), `study.json`, `study.md` with
the tables, and `study.png`.
"""

import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import lightning as L
import numpy as np
import torch
from jsonargparse import auto_cli
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from measure import gpu_memory, machine
from score_table import CRITERION, ScoreTable, cell, fill, markdown_table, open_images, verdict
from torch import Tensor, nn
from typing_extensions import override

import gmarpp
from gmarpp.attribution.layer import AttentionLayer
from gmarpp.attribution.method import Method
from gmarpp.attribution.methods import Chefer, GMARPlusPlus
from gmarpp.data.probe import spread_over_classes
from gmarpp.explainer import FAITHFULNESS_METRICS
from gmarpp.figures import figure_bytes
from gmarpp.files import write_atomically
from gmarpp.labels import metric_label
from gmarpp.run.summary import bootstrap

BASELINES = ("blur", "drop")
RIVALS = ("GMAR++ (L1)", "GMAR++ (L2)", "Chefer")
SAMPLES = 4
FINALISTS = 5


@dataclass(frozen=True)
class Rule(Method):
    """GMAR++ with other head weights, other rows, or another treatment of negative products.

    Args:
        alpha: weight of the residual connection beside the relevance.
        heads: weights of the heads: their share of the gradient's `l1`, `l2` or `max` norm, the `mean`, or the `sum`.
        rows: `row` divides each row of E + alpha I by its sum, `layer` divides E by its largest row sum before alpha I
            is added, `none` leaves E + alpha I unchanged.
        negative: products of gradient and attention below zero are cut off in each `head`, only where their `sum` over
            the heads is below zero, or they are `kept`.
    """

    alpha: float = 1.0
    heads: str = "l1"
    rows: str = "row"
    negative: str = "head"
    name: str = "rule"
    label: str = "Rule"

    def relevance(self, layer: AttentionLayer) -> Tensor:
        """Return the relevance of keys to queries by head, (B, H, Q, N)."""
        if self.negative == "sum":
            return layer.product * (layer.product.sum(dim=1, keepdim=True) > 0)
        return layer.positive_product if self.negative == "head" else layer.product

    def head_weights(self, layer: AttentionLayer) -> Tensor:
        """Return the weights of the heads, (B, H)."""
        batch, heads = layer.attention.shape[:2]
        if self.heads in ("mean", "sum"):
            return layer.attention.new_full((batch, heads), 1 / heads if self.heads == "mean" else 1.0)
        order = {"l1": 1, "l2": 2, "max": float("inf")}[self.heads]
        gradient = layer.gradient.relu() if self.negative == "head" else layer.gradient
        norms = torch.linalg.vector_norm(gradient, ord=order, dim=(-2, -1))
        return norms / norms.sum(dim=1, keepdim=True).clamp_min(1e-30)

    @override
    def step(self, row: Tensor, layer: AttentionLayer) -> Tensor:
        relevance = torch.einsum("bh,bhqk->bqk", self.head_weights(layer), self.relevance(layer))
        sums = relevance.sum(dim=-1)
        residual = self.alpha * row
        if self.rows == "row":
            row, residual = row / (sums + self.alpha), residual / (sums + self.alpha)
        elif self.rows == "layer":
            row = row / sums.amax(dim=1, keepdim=True).clamp_min(1e-30)
        return torch.einsum("bq,bqk->bk", row, relevance) + residual


@dataclass(frozen=True)
class LayerSum(Method):
    """Gradient times attention summed over layers, heads and queries, without a product over layers.

    A layer's sum is the first-order change of the score when the layer's value vectors of a token vanish.

    Args:
        queries: `all` tokens, or the `class` token alone.
        signed: keep negative products.
    """

    queries: str = "class"
    signed: bool = True
    name: str = "layer_sum"
    label: str = "Layer sum"

    @override
    def start(self, readout: Tensor, images: Tensor, tokens: int) -> Tensor:
        return readout.new_zeros(len(readout), tokens)

    @override
    def step(self, row: Tensor, layer: AttentionLayer) -> Tensor:
        product = layer.product if self.signed else layer.positive_product
        return row + (product[:, :, :1] if self.queries == "class" else product).sum(dim=(1, 2))


@dataclass(eq=False)
class FromLayer(Method):
    """A method that ignores the layers below one.

    The engine hands over each layer for all images, part by part, before the next layer below; so the number of images
    seen identifies the layer.

    Args:
        method: the method applied in the layers above.
        first: position of the lowest layer used, from 0 at the input.
    """

    method: Method
    first: int
    name: str = "from_layer"
    label: str = "From a layer up"
    _batch: int = field(default=0, init=False)
    _seen: int = field(default=0, init=False)

    @override
    def start(self, readout: Tensor, images: Tensor, tokens: int) -> Tensor:
        if self._seen > self._batch:
            self._batch = self._seen = 0
        self._batch += len(images)
        return self.method.start(readout, images, tokens)

    @override
    def step(self, row: Tensor, layer: AttentionLayer) -> Tensor:
        self._seen += len(row)
        position = layer.depth - 1 - (self._seen - 1) // self._batch
        return self.method.step(row, layer) if position >= self.first else row


@dataclass(frozen=True)
class Candidate:
    """A variant: the factor that it changes, its rule, the score that is differentiated, the smoothing of the map."""

    factor: str
    method: Method
    score: str = "logit"
    smoothing: str = "none"


CANDIDATES: dict[str, Candidate] = {
    "GMAR++ (L1)": Candidate("as published", GMARPlusPlus()),
    "GMAR++ (L2)": Candidate("as published", GMARPlusPlus(norm=2)),
    "Chefer": Candidate("as published", Chefer()),
    **{f"alpha {alpha}": Candidate("alpha", GMARPlusPlus(alpha=alpha)) for alpha in (0.1, 0.25, 0.5, 2.0, 4.0)},
    **{f"layers {k} to 12": Candidate("layers", FromLayer(GMARPlusPlus(), k - 1)) for k in (4, 7, 10)},
    **{f"heads: {heads}": Candidate("heads", Rule(heads=heads)) for heads in ("mean", "max", "sum")},
    "rows: none": Candidate("rows", Rule(rows="none")),
    "rows: by layer": Candidate("rows", Rule(rows="layer")),
    "probability": Candidate("score", GMARPlusPlus(), score="probability"),
    "margin": Candidate("score", GMARPlusPlus(), score="margin"),
    "noise 10 %": Candidate("smoothing", GMARPlusPlus(), smoothing="noise 0.1"),
    "path from mean color": Candidate("smoothing", GMARPlusPlus(), smoothing="path"),
    "class row, ReLU": Candidate("layer sum", LayerSum(signed=False)),
    "class row, signed, margin": Candidate("layer sum", LayerSum(), score="margin"),
    "all rows, ReLU": Candidate("layer sum", LayerSum("all", signed=False)),
    "Chefer, margin": Candidate("Chefer's rule", Chefer(), score="margin"),
    "Chefer, heads: sum": Candidate("Chefer's rule", Rule(heads="sum", rows="none")),
    "Chefer, ReLU of the heads' sum": Candidate("Chefer's rule", Rule(heads="mean", rows="none", negative="sum")),
    "Chefer, signed, margin": Candidate("Chefer's rule", Rule(heads="mean", rows="none", negative="kept"), "margin"),
    "alpha 0.25, margin": Candidate("combined", GMARPlusPlus(alpha=0.25), score="margin"),
    "heads: sum, margin": Candidate("combined", Rule(heads="sum"), score="margin"),
    "heads: sum, alpha 0.5": Candidate("combined", Rule(heads="sum", alpha=0.5)),
    "heads: sum, alpha 2": Candidate("combined", Rule(heads="sum", alpha=2.0)),
    "ReLU of the heads' sum": Candidate("combined", Rule(heads="sum", negative="sum")),
}


def score_of(kind: str, target: Tensor) -> Tensor | Callable[[Tensor], Tensor]:
    """Return the target of `gmarpp.explain` for a score of the classes (B,).

    The gradients of probability p, log-probability and margin (logit minus log-sum-exp of the others) differ by factors
    per image only, p (1 - p), 1 - p and 1.
    """
    if kind == "logit":
        return target

    def probability(logits: Tensor) -> Tensor:
        return logits.float().softmax(dim=1).gather(1, target[:, None])[:, 0]

    def margin(logits: Tensor) -> Tensor:
        others = logits.float().scatter(1, target[:, None], float("-inf"))
        return logits.float().gather(1, target[:, None])[:, 0] - others.logsumexp(dim=1)

    return {"probability": probability, "margin": margin}[kind]


def samples_of(smoothing: str, images: Tensor) -> list[Tensor]:
    """Return the batches (B, 3, H, W) over which a map is averaged."""
    if smoothing == "none":
        return [images]
    if smoothing == "path":
        mean = images.mean((2, 3), keepdim=True)
        return [torch.lerp(mean, images, (sample + 0.5) / SAMPLES) for sample in range(SAMPLES)]
    spread = float(smoothing.removeprefix("noise ")) * (images.amax((1, 2, 3)) - images.amin((1, 2, 3)))
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(SAMPLES, *images.shape, generator=generator).to(images.device)
    return list(images + spread.view(-1, 1, 1, 1) * noise)


def explain(model: nn.Module, images: Tensor, names: Sequence[str]) -> tuple[dict[str, Tensor], Tensor]:
    """Compute maps (B, h, w) of some candidates, one pass for all that share score and sample, and the classes (B,)."""
    groups: dict[tuple[str, str], list[Method]] = {}
    for name in names:
        candidate = CANDIDATES[name]
        method = dataclasses.replace(candidate.method, name=name)  # type: ignore[type-var]
        groups.setdefault((candidate.score, candidate.smoothing), []).append(method)
    maps: dict[str, Tensor] = {}
    with torch.autocast("cpu", torch.bfloat16):
        target = gmarpp.explain(model, images, "rollout").target
        for (score, smoothing), methods in groups.items():
            samples = samples_of(smoothing, images)
            for sample in samples:
                explanation = gmarpp.explain(model, sample, methods, score_of(score, target))
                for name, values in explanation.maps.items():
                    maps[name] = maps.get(name, torch.zeros_like(values)) + values / len(samples)
    return maps, target


def mean_criterion(table: ScoreTable, indices: Sequence[int], names: Sequence[str]) -> dict[str, float]:
    """Return the criterion of some candidates on some images."""
    return {name: float(table.values(indices, "blur", name, CRITERION).mean()) for name in names}


def development_table(table: ScoreTable, indices: Sequence[int], names: Sequence[str]) -> str:
    """Tabulate candidates: criterion, and difference from GMAR++ (L1)."""
    rows = []
    for name in names:
        row = [CANDIDATES[name].factor, name]
        for baseline in BASELINES:
            row.append(f"{table.values(indices, baseline, name, CRITERION).mean():.3f}")
            difference = table.difference(indices, baseline, name, RIVALS[0], CRITERION)
            row.append("" if name == RIVALS[0] else cell(difference, CRITERION, signed=True))
        rows.append(row)
    difference = f"minus {RIVALS[0]}"
    return markdown_table(
        ["factor", "variant", *(head for baseline in BASELINES for head in (baseline, difference))], rows
    )


def confirmation_tables(table: ScoreTable, indices: Sequence[int], confirmed: Sequence[str]) -> str:
    """Tabulate the variants confirmed and their rivals under both baselines: means with intervals, and differences."""
    parts = []
    for baseline in BASELINES:
        means, differences = [], []
        for metric in table.metrics:
            columns = [table.values(indices, baseline, name, metric) for name in (*confirmed, *RIVALS)]
            intervals = bootstrap(np.stack(columns, axis=1))
            means.append([metric_label(metric), *(cell(each, metric) for each in intervals)])
        for name in confirmed:
            for metric in table.metrics:
                gaps = [table.difference(indices, baseline, name, rival, metric) for rival in RIVALS]
                row = [f"{cell(each, metric, signed=True)} {verdict(each, metric)}" for each in gaps]
                differences.append([name, metric_label(metric), *row])
        parts.append(markdown_table([baseline, *confirmed, *RIVALS], means))
        parts.append(markdown_table([baseline, "", *(f"minus {rival}" for rival in RIVALS)], differences))
    return "\n\n".join(parts)


def objections(table: ScoreTable, indices: Sequence[int], winner: str) -> list[str]:
    """List the reasons against shipping the winner; empty if it meets the protocol's rule."""
    found = []
    for baseline in BASELINES:
        for rival in RIVALS:
            for metric in (CRITERION, *FAITHFULNESS_METRICS):
                outcome = verdict(table.difference(indices, baseline, winner, rival, metric), metric)
                if outcome == "worse" or (metric == CRITERION and outcome != "better"):
                    found.append(f"{baseline}: {metric_label(metric)} {outcome} against {rival}")
    return found


def figure_of(table: ScoreTable, indices: Sequence[int]) -> Figure:
    """Draw each candidate's difference from GMAR++ (L1) on the screening images, under both baselines."""
    names = [name for name in CANDIDATES if name != RIVALS[0]]
    figure = Figure(figsize=(8.2, 0.235 * len(names) + 1.1), dpi=200, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    positions = []
    for name in names:
        factor = CANDIDATES[name].factor
        gap = 1.6 if positions and factor != CANDIDATES[names[len(positions) - 1]].factor else 1.0
        positions.append(positions[-1] + gap if positions else 0.0)
    for baseline, color, marker, offset in (("blur", "#d7263d", "o", -0.16), ("drop", "#2a62c9", "s", 0.16)):
        intervals = [table.difference(indices, baseline, name, RIVALS[0], CRITERION) for name in names]
        means = np.array([each.mean for each in intervals])
        bounds = np.array([(each.mean - each.low, each.high - each.mean) for each in intervals]).T
        rows = np.array(positions) + offset
        axes.errorbar(means, rows, xerr=bounds, fmt=marker, color=color, markersize=3.5, linewidth=1.1, label=baseline)
    axes.axvline(0, color="#555555", linewidth=0.9)
    axes.set_yticks(positions, names, fontsize=7.5)
    axes.set_ylim(positions[-1] + 0.8, -0.8)
    axes.set_xlabel("insertion AUC minus deletion AUC, difference from GMAR++ (L1); right is better", fontsize=8.5)
    axes.grid(axis="x", color="#e6e6e6", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(axis="x", labelsize=8)
    axes.legend(fontsize=8, frameon=False, title="baseline", title_fontsize=8, loc="lower left")
    return figure


def study(
    data: L.LightningDataModule,
    ckpt_path: str = "checkpoints/vit_small_patch14_112.tiny_imagenet.safetensors",
    output: str = "results/study",
    screening: int = 80,
    development: int = 160,
    confirmation: int = 400,
    device: str = "cpu",
) -> None:
    """Compare all candidates on the development images, and confirm the best on the others.

    Args:
        data: data module; the images are those it predicts on.
        ckpt_path: checkpoint of a network with a class token, as for `explain.py`.
        output: folder of the results.
        screening: number of images that all candidates are scored on.
        development: number of images that choose, those among them.
        confirmation: number of images that confirm.
        device: that computes, for example `cpu` or `cuda:0`.
    """
    computing = torch.device(device)
    model, dataset = open_images(ckpt_path, data, computing)
    chosen = spread_over_classes(dataset.labels, development + confirmation).tolist()
    first, second = chosen[:development], chosen[development:]
    options = {"ckpt_path": Path(ckpt_path).name, "steps": 8, "precision": "bfloat16"}
    table = ScoreTable(Path(output), options)

    def score(indices: Sequence[int], names: Sequence[str]) -> None:
        fill(table, model, dataset, dict.fromkeys(BASELINES, indices), names, explain, steps=8, precision="bfloat16")

    screened = first[:screening]
    score(screened, list(CANDIDATES))
    criterion = mean_criterion(table, screened, [name for name in CANDIDATES if name not in RIVALS])
    finalists = [*RIVALS, *sorted(criterion, key=lambda name: -criterion[name])[:FINALISTS]]
    score(first, finalists)
    criterion = mean_criterion(table, first, finalists)
    eligible = [name for name in finalists if name not in RIVALS and CANDIDATES[name].smoothing == "none"]
    winner = max(eligible, key=lambda name: criterion[name])
    # The same rule with the logit needs no separate score, so it fits into the pass that all methods share.
    rule = CANDIDATES[winner].method
    plain = [name for name, each in CANDIDATES.items() if each.method == rule and each.score == "logit"]
    confirmed = list(dict.fromkeys((winner, *plain)))
    score(second, (*confirmed, *RIVALS))

    found = {name: objections(table, second, name) for name in confirmed}
    parts = [f"## Screening, {screening} images", development_table(table, screened, list(CANDIDATES))]
    parts += [f"## Development, {development} images", development_table(table, first, finalists)]
    parts += [f"## Confirmation, {confirmation} images", confirmation_tables(table, second, confirmed)]
    outcome = {
        **machine(computing),
        **gpu_memory(computing),
        "winner": winner,
        "criterion": criterion,
        "objections": found,
    }
    write_atomically(Path(output) / "study.md", ("\n\n".join(parts) + "\n").encode())
    write_atomically(Path(output) / "study.json", (json.dumps(outcome, indent=2) + "\n").encode())
    write_atomically(Path(output) / "study.png", figure_bytes(figure_of(table, screened)))
    print(
        *parts,
        *(f"{name}: {each or 'worth shipping by the rule of the protocol'}" for name, each in found.items()),
        sep="\n\n",
    )


if __name__ == "__main__":
    auto_cli(study, as_positional=False)
