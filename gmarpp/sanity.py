"""Model-parameter randomization: do the maps depend on what the network has learned?

    python -m gmarpp.sanity --ckpt_path checkpoints/X --data TinyImageNet --data.root data --output results/sanity

Source: Adebayo et al., "Sanity Checks for Saliency Maps", NeurIPS 2018, cascading randomization.
"""

import csv
import io
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from gmarpp.attribution import METHODS, Architecture, AttributionMethod, architecture_of, explain
from gmarpp.attribution.registry import register_method, select_methods
from gmarpp.attribution.replay import forwards_replaced
from gmarpp.command import run_function
from gmarpp.data.probe import choose_probe
from gmarpp.figures import figure_bytes
from gmarpp.files import write_atomically
from gmarpp.labels import method_color, method_dashes, method_label
from gmarpp.metrics.functional import rank_correlation
from gmarpp.network.families import resolve_architecture
from gmarpp.network.modes import evaluation_mode
from gmarpp.network.output import logits_of
from gmarpp.network.preprocessing import Preprocessing
from gmarpp.options import Name
from gmarpp.training.network_choice import NetworkChoice, load_chosen

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SanityCheck:
    """Rank correlation of maps with the trained network's, while the network is randomized from the head down.

    Attributes:
        stages: what has been randomized so far, from `trained` to `embedding`.
        correlations: by method, shape (stages, images): Spearman's rank correlation, in [-1, 1].
    """

    stages: tuple[str, ...]
    correlations: dict[str, Tensor]

    def unchanged(self) -> list[str]:
        """Return the methods whose mean correlation stays above 0.9 with all parameters randomized."""
        return [method for method, values in self.correlations.items() if values[-1].mean() > 0.9]

    def blind_to_head(self) -> list[str]:
        """Return the methods whose maps hardly change, above 0.99, when the head, which alone knows classes, is random.

        A network without parameters after its blocks has no head to randomize: none is named.
        """
        if "head" not in self.stages:
            return []
        return [method for method, values in self.correlations.items() if values[1].mean() > 0.99]


def sanity_check(
    model: nn.Module,
    images: Tensor,
    methods: Sequence[str | AttributionMethod] = METHODS,
    target: Tensor | None = None,
    *,
    architecture: Architecture | None = None,
    seed: int = 0,
    batch_size: int = 8,
) -> SanityCheck:
    """Randomize a network's parameters from the head down, and compare the maps with the trained network's.

    Every parameter is replaced by normal numbers with its own mean and standard deviation, so what was learned is lost,
    and the scale of activations stays. The network gets its own parameters back, even after an error.

    Args:
        model: a network that `gmarpp.explain` can explain, whose blocks are known.
        images: shape (B, 3, H, W), preprocessed.
        methods: names of attribution methods, or objects.
        target: class explained at every stage, (B,); the trained network's prediction by default.
        architecture: token layout of a network of an unknown family.
        seed: of the random parameters.
        batch_size: images explained at once, which bounds the memory.

    Raises:
        ValueError: as `gmarpp.explain` does, and for an architecture without blocks.
    """
    if batch_size < 1 or not len(images):
        raise ValueError(f"expected images and a batch_size of at least 1, got {len(images)} and {batch_size}")
    if target is not None and (not isinstance(target, Tensor) or target.shape != images.shape[:1]):
        raise ValueError(f"target: expected a tensor of one class per image, ({len(images)},), got {target!r:.80}")
    blocks = list((architecture or architecture_of(model)).blocks)
    if not blocks:
        raise ValueError("sanity checks need the network's blocks: pass them in gmarpp.Architecture(..., blocks=...)")

    def explained(target: Tensor | None) -> tuple[dict[str, Tensor], Tensor]:
        parts = [
            explain(model, images[part], methods, None if target is None else target[part], architecture=architecture)
            for part in (slice(start, start + batch_size) for start in range(0, len(images), batch_size))
        ]
        maps = {method: torch.cat([part.maps[method] for part in parts]).cpu() for method in parts[0].maps}
        return maps, torch.cat([part.target for part in parts])

    trained, target = explained(target)
    generator = torch.Generator().manual_seed(seed)
    stages = ["trained"]
    correlations = {method: [torch.ones(len(images))] for method in trained}
    with _restoring(model):
        for stage, parameters in _cascade(model, images[:1], blocks):
            for parameter in parameters:
                _randomize(parameter, generator)
            stages.append(stage)
            for method, maps in explained(target)[0].items():
                correlations[method].append(rank_correlation(maps, trained[method]).float())
    return SanityCheck(tuple(stages), {method: torch.stack(each) for method, each in correlations.items()})


def _randomize(parameter: nn.Parameter, generator: torch.Generator) -> None:
    noise = torch.randn(parameter.shape, generator=generator).to(parameter)
    spread = parameter.data.std() if parameter.numel() > 1 else parameter.data.abs().mean()
    parameter.data = parameter.data.mean() + spread * noise


@contextmanager
def _restoring(model: nn.Module) -> Iterator[None]:
    own = [(parameter, parameter.data) for parameter in model.parameters()]
    try:
        yield
    finally:
        for parameter, data in own:
            parameter.data = data


def _head(model: nn.Module, image: Tensor, blocks: list[nn.Module]) -> set[str]:
    """Return the names of the parameters that the logits depend on beside what leaves the blocks."""

    def cut(forward: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **options: tree_map_only(Tensor, Tensor.detach, forward(*args, **options))

    with torch.inference_mode(False), torch.enable_grad(), evaluation_mode(model):
        named = {name: parameter for name, parameter in model.named_parameters() if parameter.is_floating_point()}
        frozen = [parameter for parameter in named.values() if not parameter.requires_grad]
        try:
            for parameter in frozen:
                parameter.requires_grad_(True)
            with forwards_replaced(blocks, [cut(block.forward) for block in blocks]):
                score = logits_of(model(image.clone())).sum()
            if not score.requires_grad:
                return set()
            gradients = torch.autograd.grad(score, list(named.values()), allow_unused=True)
        finally:
            for parameter in frozen:
                parameter.requires_grad_(False)
    return {name for name, gradient in zip(named, gradients, strict=True) if gradient is not None}


def _cascade(model: nn.Module, image: Tensor, blocks: list[nn.Module]) -> Iterator[tuple[str, list[nn.Parameter]]]:
    """Yield the parameters of each stage: after the blocks, if any, of each block from the top, others."""
    in_blocks = {id(parameter) for block in blocks for parameter in block.parameters()}
    others = {name: each for name, each in model.named_parameters() if id(each) not in in_blocks}
    head = _head(model, image, blocks) & others.keys()
    if head:
        yield "head", [each for name, each in others.items() if name in head]
    for position in reversed(range(len(blocks))):
        yield f"block {position + 1}", list(blocks[position].parameters())
    yield "embedding", [each for name, each in others.items() if name not in head]


def cascade_figure(check: SanityCheck) -> Figure:
    """Draw each method's mean rank correlation against how far the network has been randomized."""
    figure = Figure(figsize=(7.6, 3.9), dpi=200, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for method in sorted(check.correlations, key=lambda name: -float(check.correlations[name][1:].mean())):
        mean = check.correlations[method].mean(dim=1).numpy()
        (line,) = axes.plot(np.arange(len(mean)), mean, label=method_label(method), linewidth=1.6)
        line.set(color=method_color(method), linestyle=method_dashes(method))
    axes.set_xticks(np.arange(len(check.stages)), check.stages, rotation=45, ha="right", fontsize=8)
    axes.set_xlabel("randomized from the head down to …", fontsize=9)
    axes.set_ylabel("rank correlation with\nthe trained network's map", fontsize=9)
    axes.axhline(0, color="#888888", linewidth=0.8)
    axes.grid(color="#e6e6e6", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
    axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def write_sanity_check(
    data: L.LightningDataModule,
    ckpt_path: str | None = None,
    model: NetworkChoice = None,
    architecture: str | None = None,
    output: str = "results/sanity",
    methods: Sequence[Name | AttributionMethod] = METHODS,
    images: int = 64,
    seed: int = 0,
) -> None:
    """Randomize a trained network step by step and write `sanity.csv` and `sanity.png`.

    Args:
        data: data module; images are chosen from those it predicts on, spread over the classes.
        ckpt_path: checkpoint, as for `predict`.
        model: network, as for `predict`, where the checkpoint does not name it.
        architecture: of a network that is not found by itself, as for `predict`.
        output: folder of the results.
        methods: names of attribution methods; or their `class_path` and `init_args`.
        images: number of images, at least 1.
        seed: of the random parameters.

    Raises:
        FileNotFoundError: there is no such checkpoint, or no data.
        ValueError: the checkpoint, an option, or the kind of data cannot be used.
        OSError: the output cannot be written.
    """
    if images < 1:
        raise ValueError(f"--images: expected at least 1, got {images}")
    selected = select_methods(methods)
    for each in selected:
        register_method(each)
    module = load_chosen(model, ckpt_path)
    layout = resolve_architecture(architecture, module.model)
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    batch = _chosen_images(data, module.preprocessing, images)
    check = sanity_check(module.model, batch, selected, architecture=layout, seed=seed)
    table = io.StringIO()
    writer = csv.writer(table)
    writer.writerow(("method", *check.stages))
    for method, values in check.correlations.items():
        writer.writerow((method, *(f"{value:.4f}" for value in values.mean(dim=1).tolist())))
    write_atomically(folder / "sanity.csv", table.getvalue().encode())
    write_atomically(folder / "sanity.png", figure_bytes(cascade_figure(check)))
    logger.info("%s: %s", folder / "sanity.csv", table.getvalue())
    for names, text in (
        (check.unchanged(), "does not change when all parameters are random: it does not show what was learned"),
        (check.blind_to_head(), "does not change when the head is random: it does not depend on the class"),
    ):
        for name in names:
            logger.warning("%s %s", method_label(name), text)


def _chosen_images(data: Any, preprocessing: Preprocessing | None, count: int) -> Tensor:
    """Return prepared images that are spread over the classes, (B, 3, H, W)."""
    data.preprocessing = preprocessing or data.preprocessing
    data.prepare_data()
    data.setup("predict")
    dataset: Any = getattr(data, "datasets", {}).get("predict")
    if not hasattr(dataset, "labels"):
        raise ValueError(
            f"--data {type(data).__name__} cannot be used: expected a data module of gmarpp whose images can "
            "be chosen from, not a streamed one"
        )
    samples = (dataset[int(index)] for index in choose_probe(dataset, count))
    return torch.stack([sample["image"] for sample in samples if sample is not None])


def main(args: list[str] | None = None) -> None:
    """Run the command line; a user's mistake ends with one line on stderr and a status other than 0."""
    run_function(write_sanity_check, args)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    main()
