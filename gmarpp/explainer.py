"""Maps, perturbation curves and metric values of one batch: what the predict loop and the monitor share."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeAlias, get_args

import torch
from torch import Tensor, nn

from gmarpp.attribution import AttributionMethod, Contrast, Explanation, explain, register_method, resolve_method
from gmarpp.attribution.registry import is_own, select_methods
from gmarpp.attribution.target import NO_CLASS, Target
from gmarpp.explained import ExplainedBatch
from gmarpp.label_rows import LabelRows
from gmarpp.metrics import METRICS
from gmarpp.metrics.functional import boxes_to_masks
from gmarpp.metrics.registry import is_own_metric, metric_function, metric_inputs, require_metric
from gmarpp.network.architecture import Architecture
from gmarpp.network.extent import fit_to_extent
from gmarpp.network.families import resolve_architecture
from gmarpp.network.task import score_of, task_of
from gmarpp.options import Name, Range, require_ranges
from gmarpp.perturbation import (
    BASELINES,
    SCORES,
    Baseline,
    Curves,
    KeptMask,
    PerturbationScores,
    RoadScores,
    Score,
    class_scores,
    map_changes,
    road_scores,
    score_perturbations,
    square_removals,
)

if TYPE_CHECKING:
    from gmarpp.attribution.target import Score as ScoreFunction

    ExplainedTarget: TypeAlias = str | int | Sequence[str | int] | Contrast | ScoreFunction
else:
    # On command lines and in files only classes have names.
    ExplainedTarget = Name | int | Sequence[Name | int]

FAITHFULNESS_METRICS = ("average_drop", "average_increase", "average_gain", "insertion_auc", "deletion_auc")
"""The five metrics of the published claim."""


@dataclass(frozen=True)
class Explainer:
    """Explains batches of a data module.

    Args:
        methods: names of attribution methods, in the order of all outputs; or objects, which are registered, in files
            and on command lines as `class_path` and `init_args`.
        target: what is explained: `predicted`, `label`, or a class name or index, or several, for all images; in Python
            also a `gmarpp.Contrast`, one of `gmarpp.targets`, or a function of the network's output. Of a multi-label
            network `predicted` and `label` are all labels that it predicts or that an image has.
        metrics: names in `gmarpp.metrics.METRICS`; localization metrics need boxes or masks in the data. Empty for maps
            only, which is about fifty times faster.
        steps: of the insertion and deletion curves.
        baseline: what replaces a removed patch: `blur`, `mean`, `black`, or `drop`, which takes the token out.
        score: `probability` (softmax), `sigmoid` or `logit`; by default what the network's task asks for. A network
            with one output needs one of the latter two.
        mask: kept region of Average Drop, Increase and Gain: `topk` (top 25 % of the patches) or `soft`.
        normalize: rescale each curve by the score on the image minus the score on the baseline.
        batch_size: images per forward pass of the perturbed images, which bounds the memory; when not given, 128, and
            on a GPU as many as have 2**25 values.
        recompute: keep only the inputs of blocks, and run each block again in the backward pass.
        architecture: token layout of a network that is not found by itself, or a function from the network to it; by
            name: the path of such a function, or the module of a known family inside the network.

    Raises:
        ValueError: for an unknown method, metric, baseline, score or mask, or options that exclude each other.
    """

    methods: Sequence[Name | AttributionMethod] = (
        "token_relevance",
        "gmarpp_balanced",
        "gmarpp_l1",
        "legrad",
        "rollout",
    )
    target: ExplainedTarget = "predicted"
    metrics: Sequence[str] = FAITHFULNESS_METRICS
    steps: int = 28
    baseline: Baseline = "blur"
    score: Score | None = None
    mask: KeptMask = "topk"
    normalize: bool = False
    batch_size: int | None = None
    recompute: bool = False
    architecture: str | Architecture | Callable[[nn.Module], Architecture] | None = None
    _needs: frozenset[str] = field(init=False, repr=False, compare=False, default=frozenset())

    def __post_init__(self) -> None:
        if not self.methods:
            raise ValueError("explain.methods: expected at least one method, got none")
        methods: dict[str, str | AttributionMethod] = {}
        for item in self.methods:
            if isinstance(item, AttributionMethod):
                register_method(item)
                methods.setdefault(item.name, item)
            else:
                name = resolve_method(item)
                methods.setdefault(name, name)
        object.__setattr__(self, "methods", tuple(methods.values()))
        object.__setattr__(self, "metrics", tuple(dict.fromkeys(self.metrics)))
        if isinstance(self.target, Sequence) and not isinstance(self.target, str):
            if not self.target:
                raise ValueError("explain.target: expected at least one class, got none")
            object.__setattr__(self, "target", list(dict.fromkeys(self.target)))
        for metric in self.metrics:
            require_metric(metric)
        for option, value, choices in (
            ("baseline", self.baseline, BASELINES),
            ("score", self.score, (None, *SCORES)),
            ("mask", self.mask, get_args(KeptMask)),
        ):
            if value not in choices:
                known = ", ".join(filter(None, choices))
                raise ValueError(f"explain.{option}: unknown {option} {value!r}: choose from {known}")
        require_ranges(vars(self), {"steps": Range(1), "batch_size": Range(1)}, "explain.")
        needs = {name for metric in self.metrics for name in metric_inputs(metric)}
        if "kept" in needs and self.mask == "soft" and self.baseline == "drop":
            raise ValueError(
                "explain.mask soft fades patches, but explain.baseline drop can only remove them: use mask topk, or "
                "baseline blur, mean or black"
            )
        object.__setattr__(self, "_needs", frozenset(needs))

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the methods, which are the keys of all outputs."""
        return tuple(method.name for method in select_methods(self.methods))

    @property
    def own_code(self) -> dict[str, Any]:
        """Classes and options of `methods` and classes of `metrics` of one's own, by name; empty without any."""
        methods = {method.name: method.description for method in select_methods(self.methods) if is_own(method)}
        metrics = {name: METRICS[name] for name in self.metrics if is_own_metric(name)}
        return {kind: own for kind, own in (("methods", methods), ("metrics", metrics)) if own}

    @property
    def signed_methods(self) -> tuple[str, ...]:
        """Names of the methods whose maps are signed."""
        return tuple(method.name for method in select_methods(self.methods) if method.signed)

    def for_network(self, model: nn.Module) -> "Explainer":
        """Return the same with the score of the network's task, where none is asked for."""
        return self if self.score is not None else replace(self, score=score_of(task_of(model)))

    def __call__(self, model: nn.Module, batch: Mapping[str, Any]) -> ExplainedBatch | None:
        """Explain a batch of a data module.

        Args:
            model: the network, in any mode.
            batch: `image` (B, C, H, W), `label` (B,) or (B, C), `index` (B,), `path`, and `box` (B, 4) or `mask`
                (B, H, W) if any, or of each label (B, C, …).

        Returns:
            The batch explained; None where its images have none of the labels to explain.

        Raises:
            ValueError: if the target is `label` and an image has none; what `gmarpp.explain` raises.
        """
        explainer = self.for_network(model)
        target = self.target
        rows = None if callable(target) or isinstance(target, Contrast) else LabelRows.of(model, batch, target)
        if rows is None:
            return explainer._explain(model, batch, self._target(batch))
        size = len(batch["image"])
        parts = [
            explainer._explain(model, part.batch(batch), part.target, part)
            for part in (rows.part(start, size) for start in range(0, len(rows), size))
        ]
        return ExplainedBatch.concatenate(parts) if parts else None

    def _explain(
        self, model: nn.Module, batch: Mapping[str, Any], target: Any, rows: LabelRows | None = None
    ) -> ExplainedBatch:
        images: Tensor = batch["image"]
        layout = resolve_architecture(self.architecture, model)
        explanation = explain(model, images, self.methods, target, architecture=layout, recompute=self.recompute)
        if explanation.target.dim() != 1:
            given = tuple(explanation.target.shape)
            raise ValueError(f"explain.target: expected one score per image, shape ({len(images)},), got {given}")
        label: Tensor = batch["label"]
        predicted, target_probability, predicted_probability = self._prediction(model, explanation)
        if rows is not None:
            label, predicted = rows.labels(label, predicted, explanation.logits)
            if rows.task != "multiclass":
                predicted_probability = target_probability
        # Maps cover the pixels that the network sees, so pictures and objects are cropped to these.
        height, width = explanation.images.shape[2:]
        boxes, masks = _cropped(batch.get("box"), batch.get("mask"), (height, width))
        objects = masks if masks is not None or boxes is None else boxes_to_masks(boxes, (height, width))
        inputs = self._metric_inputs(model, images, explanation, objects)
        values = {method: {metric: self._value(metric, inputs[method]) for metric in self.metrics} for method in inputs}
        curves = {
            method: Curves(given["fractions"], given["insertion"], given["deletion"])
            for method, given in inputs.items()
            if "fractions" in given
        }
        return ExplainedBatch(
            index=batch["index"].cpu(),
            path=list(batch["path"]),
            label=label.cpu(),
            target=explanation.target.cpu(),
            predicted=predicted.cpu(),
            target_probability=target_probability.cpu(),
            predicted_probability=predicted_probability.cpu(),
            maps={method: maps.cpu() for method, maps in explanation.maps.items()},
            values=values,
            inputs=inputs,
            curves=curves,
            images=explanation.images.cpu(),
            boxes=None if boxes is None else boxes.cpu(),
            masks=None if masks is None else masks.cpu(),
            rows_per_image=1 if rows is None else rows.places,
        )

    def _prediction(self, model: nn.Module, explanation: Explanation) -> tuple[Tensor, Tensor, Tensor]:
        """Return the predicted class and the probabilities of the explained and the predicted one, (B,) each."""
        logits, target = explanation.logits, explanation.target
        if bool((target == NO_CLASS).any()):
            unknown = torch.full_like(logits[:, 0], torch.nan, dtype=torch.float32)
            return target, unknown, unknown
        if task_of(model) == "regression" or (self.score == "logit" and logits.shape[1] == 1):
            probabilities = torch.full_like(logits, torch.nan, dtype=torch.float32)
        else:
            probabilities = class_scores(logits, "sigmoid" if self.score == "sigmoid" else "probability")
        return logits.argmax(dim=1), probabilities.gather(1, target[:, None])[:, 0], probabilities.amax(dim=1)

    def _target(self, batch: Mapping[str, Any]) -> Target:
        if isinstance(self.target, str) and self.target == "predicted":
            return None
        if isinstance(self.target, str) and self.target == "label":
            unlabeled = (batch["label"] < 0).nonzero().flatten().tolist()
            if unlabeled:
                raise ValueError(
                    f"explain.target is label, but {batch['path'][unlabeled[0]]} has none: explain the predicted "
                    "class, or name a class"
                )
            labels: Tensor = batch["label"]
            return labels
        assert not isinstance(self.target, Sequence) or isinstance(self.target, str)
        return self.target

    def _metric_inputs(
        self, model: nn.Module, images: Tensor, explanation: Explanation, objects: Tensor | None
    ) -> dict[str, dict[str, Tensor]]:
        inputs: dict[str, dict[str, Tensor]] = {method: {"maps": maps} for method, maps in explanation.maps.items()}
        if objects is not None:
            for given in inputs.values():
                given["masks"] = objects
        is_class = not (callable(self.target) or isinstance(self.target, Contrast))
        target: Target = explanation.target if is_class else self.target
        scored = (model, images, explanation.maps, target)
        score = self.score or "probability"
        if self._needs & {"full", "kept", "insertion", "deletion"}:
            scores = score_perturbations(
                *scored,
                steps=self.steps,
                baseline=self.baseline,
                score=score,
                mask=self.mask,
                normalize=self.normalize,
                batch_size=self.batch_size,
                curves=bool(self._needs & {"insertion", "deletion"}),
                kept="kept" in self._needs,
            )
            _add_scores(inputs, scores)
        if "most_relevant_first" in self._needs:
            _add_road(inputs, road_scores(*scored, score=score, batch_size=self.batch_size))
        if self._needs & {"removed_relevance", "score_drops"}:
            removals = square_removals(*scored, baseline=self.baseline, score=score, batch_size=self.batch_size)
            for method, given in inputs.items():
                given["removed_relevance"] = removals.removed_relevance[method]
                given["score_drops"] = removals.score_drops
        if "map_changes" in self._needs:
            layout = resolve_architecture(self.architecture, model)
            changes = map_changes(model, images, self.methods, target, architecture=layout, recompute=self.recompute)
            for method, given in inputs.items():
                given["map_changes"] = changes[method]
        return {method: {name: value.cpu() for name, value in given.items()} for method, given in inputs.items()}

    @staticmethod
    def _value(metric: str, given: Mapping[str, Tensor]) -> Tensor:
        arguments = metric_inputs(metric)
        if "masks" in arguments and "masks" not in given:
            return torch.full((len(given["maps"]),), torch.nan, dtype=torch.float32)
        value = metric_function(metric)(**{name: given[name] for name in arguments}, reduction="none")
        if not isinstance(value, Tensor) or value.shape != (len(given["maps"]),):
            expected = f"expected a value per image, shape ({len(given['maps'])},)"
            got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"{metric}: {expected} with reduction='none', got {got}")
        return value.float()


def _cropped(boxes: Tensor | None, masks: Tensor | None, size: tuple[int, int]) -> tuple[Tensor | None, Tensor | None]:
    height, width = size
    if boxes is not None:
        boxes = torch.minimum(boxes, boxes.new_tensor([width, height, width, height]))
    return boxes, None if masks is None else fit_to_extent(masks, size)


def _add_scores(inputs: dict[str, dict[str, Tensor]], scores: PerturbationScores) -> None:
    for method, given in inputs.items():
        if method in scores.kept:
            given |= {"full": scores.full, "kept": scores.kept[method]}
        if method in scores.insertion:
            given |= {
                "fractions": scores.fractions,
                "insertion": scores.insertion[method],
                "deletion": scores.deletion[method],
            }


def _add_road(inputs: dict[str, dict[str, Tensor]], road: RoadScores) -> None:
    for method, given in inputs.items():
        given["most_relevant_first"] = road.most_relevant_first[method]
        given["least_relevant_first"] = road.least_relevant_first[method]
