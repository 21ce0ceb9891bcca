"""AdamW with layer-wise learning rates, and the warm-up and cosine that they follow."""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from timm.optim import param_groups_layer_decay
from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from gmarpp.options import Range, require_ranges


@dataclass(frozen=True)
class Optimization:
    """AdamW with layer-wise learning rates, a linear warm-up and half a cosine.

    Args:
        lr: peak learning rate of the head, > 0.
        lr_batch_size: the effective batch size that `lr` is meant for, at least 1; the rate in use grows in proportion
            to the run's own (Goyal et al. 2017). When not given, `lr` is used as it is.
        betas: AdamW's moment decays, both in [0, 1).
        weight_decay: AdamW's decoupled weight decay, >= 0; biases, norms and embeddings are excluded.
        layer_decay: learning-rate factor per layer away from the head, in (0, 1].
        warmup: share of all steps in which the rate rises linearly, in [0, 1); a half cosine follows.
        min_lr_ratio: last learning rate as a share of the peak, in [0, 1].

    Raises:
        ValueError: an option is out of range.
    """

    lr: float = 2.5e-4
    lr_batch_size: int | None = None
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.05
    layer_decay: float = 0.75
    warmup: float = 0.1
    min_lr_ratio: float = 0.0

    def __post_init__(self) -> None:
        ranges = {
            "lr": Range(0, low_open=True),
            "lr_batch_size": Range(1),
            "betas": Range(0, 1, high_open=True),
            "weight_decay": Range(0),
            "layer_decay": Range(0, 1, low_open=True),
            "warmup": Range(0, 1, high_open=True),
            "min_lr_ratio": Range(0, 1),
        }
        require_ranges(vars(self), ranges, "--model.optimizer.")
        if len(self.betas) != 2:
            raise ValueError(f"--model.optimizer.betas: expected two numbers, got {self.betas}")


def parameter_groups(model: nn.Module, lr: float, weight_decay: float, layer_decay: float) -> list[dict[str, Any]]:
    """Group a network's trainable parameters by depth and by whether they are decayed.

    A parameter `d` layers below the head gets the learning rate `lr * layer_decay**d` (Clark et al. 2020, ELECTRA; Bao
    et al. 2022, BEiT). Biases, norms and the parameters that the network names in `no_weight_decay()` (position
    embedding, class token) are not decayed.

    Args:
        model: any timm network; its `group_matcher` says which layer a parameter belongs to.
        lr: learning rate of the head, > 0.
        weight_decay: AdamW's decoupled weight decay, >= 0.
        layer_decay: factor per layer, in (0, 1]; 1 gives every layer the same rate.

    Returns:
        Groups with `params`, `lr` and `weight_decay`, no two of them with the same values of both; nothing else has to
        be applied to them later.
    """
    exclusions: Collection[str] = getattr(model, "no_weight_decay", tuple)()
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for part in param_groups_layer_decay(
        model, weight_decay=weight_decay, no_weight_decay_list=exclusions, layer_decay=layer_decay
    ):
        # Torch's schedulers know nothing of timm's lr_scale: unless it is folded in here every layer gets the same rate
        options = lr * part["lr_scale"], part["weight_decay"]
        group = groups.setdefault(options, {"params": [], "lr": options[0], "weight_decay": options[1]})
        group["params"] += part["params"]
    return list(groups.values())


def adamw(groups: Sequence[dict[str, Any]], betas: tuple[float, float]) -> AdamW:
    """Return AdamW, which takes a step in one kernel per group where all parameters are on a GPU.

    Args:
        groups: from `parameter_groups`.
        betas: moment decays.
    """
    fused = _on_gpu(groups)
    optimizer = AdamW(groups, betas=betas, fused=fused or None)
    # By this mark torch leaves it to fused optimizers to unscale gradients, and Lightning refuses to clip them.
    optimizer._step_supports_amp_scaling = False

    def keep_kernel(_: Optimizer, state: Mapping[str, Any]) -> dict[str, Any]:
        # It is the machine's, not the run's, which may have begun on another one.
        return {**state, "param_groups": [{**group, "fused": fused or None} for group in state["param_groups"]]}

    optimizer.register_load_state_dict_pre_hook(keep_kernel)
    return optimizer


def _on_gpu(groups: Sequence[Mapping[str, Any]]) -> bool:
    return all(parameter.is_cuda and parameter.is_floating_point() for group in groups for parameter in group["params"])


def warmup_cosine(step: int, total: int, warmup: int, floor: float = 0.0) -> float:
    """Share of the peak learning rate that the update number `step` uses.

    Rises linearly to 1 at `step == warmup`, then falls along half a cosine to `floor` at `step == total` (Loshchilov &
    Hutter 2017). No update of a run, which are numbered 0 to `total` - 1, is wasted on a rate of zero.

    Args:
        step: updates done so far.
        total: updates of the whole run.
        warmup: updates before the peak, < `total`.
        floor: the last value, as a share of the peak.

    >>> [round(warmup_cosine(step, total=8, warmup=4), 3) for step in (0, 3, 4, 6, 8)]
    [0.2, 0.8, 1.0, 0.5, 0.0]
    """
    if step < warmup:
        return (step + 1) / (warmup + 1)
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))


def warmup_cosine_schedule(optimizer: Optimizer, total: int, warmup: int, floor: float = 0.0) -> LambdaLR:
    """Scale every group's own learning rate by `warmup_cosine`; stepped after each optimizer step."""
    return LambdaLR(optimizer, lambda step: warmup_cosine(step, total, warmup, floor))
