"""Attribution methods: one small class per technique, each consuming attention layers from the top down.

A method carries one row vector per image, shape (B, N), from the readout to the input tokens.
"""

import math
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor
from typing_extensions import override

from gmarpp.attribution.layer import AttentionLayer, HeadNorm
from gmarpp.attribution.method import Method
from gmarpp.attribution.noise import noise
from gmarpp.attribution.products import RowProduct


@dataclass(frozen=True)
class Rollout(RowProduct):
    """Attention rollout: `M = rownorm(mean_h A + alpha I)`.

    Args:
        alpha: weight of the residual connection beside the attention, 0 or more.
        name: key of the map.
        label: name for people.
        start_layer: the lowest layer that takes part, counted from the input and from 0; those below are skipped.

    Raises:
        ValueError: alpha or the layer is negative.

    Source: Abnar & Zuidema, "Quantifying Attention Flow in Transformers", ACL 2020.
    """

    alpha: float = 1.0
    name: str = "rollout"
    label: str = "Rollout"
    start_layer: int = 0
    needs_gradient: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not 0 <= self.alpha < math.inf:
            raise ValueError(f"{self.name}: alpha: expected 0 or more, got {self.alpha}")
        if not isinstance(self.start_layer, int) or self.start_layer < 0:
            raise ValueError(f"{self.name}: start_layer: expected 0 or more, got {self.start_layer}")

    @override
    def head_weights(self, layer: AttentionLayer) -> Tensor:
        return layer.equal_shares


@dataclass(frozen=True)
class GMAR(Rollout):
    """Rollout with heads weighted by the norm of their gradient: `w_h = ‖G_h‖_p / Σ_h ‖G_h‖_p`.

    Args:
        alpha: weight of the residual connection beside the attention.
        name: key of the map.
        label: name for people.
        start_layer: the lowest layer that takes part.
        norm: p, 1 or 2.

    Source: Jo et al., "GMAR: Gradient-Driven Multi-Head Attention Rollout for Vision Transformer Interpretability",
    arXiv 2504.19414, 2025.
    """

    name: str = "gmar_l1"
    label: str = "GMAR (L1)"
    norm: int = 1
    needs_gradient: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_norm(self.name, self.norm, (1, 2))

    @property
    @override
    def head_norms(self) -> tuple[HeadNorm, ...]:
        return ("gradient_l1" if self.norm == 1 else "gradient_l2",)

    @override
    def head_weights(self, layer: AttentionLayer) -> Tensor:
        # Without any gradient the shares are equal, which is plain rollout.
        return layer.head_share(*self.head_norms)


@dataclass(frozen=True)
class GMARPlusPlus(Rollout):
    """Rollout of positive gradients times attention: `E = Σ_h w_h ReLU(G_h) ⊙ A_h`, `M = rownorm(E + alpha I)`.

    Heads are weighted by `w_h = ‖ReLU(G_h)‖_p / Σ_h ‖ReLU(G_h)‖_p`. In a layer without any positive gradient M = I.

    Args:
        alpha: weight of the residual connection beside the relevance.
        name: key of the map.
        label: name for people.
        start_layer: the lowest layer that takes part.
        norm: p, 1 or 2; `None` adds the heads up without weights, `w_h = 1`.
    """

    name: str = "gmarpp_l1"
    label: str = "GMAR++ (L1)"
    norm: int | None = 1
    needs_gradient: ClassVar[bool] = True
    relevance: ClassVar[Literal["attention", "product"]] = "product"

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_norm(self.name, self.norm, (1, 2, None))

    @property
    @override
    def head_norms(self) -> tuple[HeadNorm, ...]:
        return () if self.norm is None else ("positive_l1" if self.norm == 1 else "positive_l2",)

    @override
    def head_weights(self, layer: AttentionLayer) -> Tensor:
        return layer.head_share(*self.head_norms) if self.head_norms else torch.ones_like(layer.equal_shares)


@dataclass(frozen=True)
class BalancedRollout(RowProduct):
    """Rollout of positive balanced gradients times attention, `E = Σ_h ReLU(G_h) ⊙ A_h`, in each layer's own balance.

    `M = rownorm(E + diag(a))`, where `a_i = ReLU(x_i · ds/dm_i)` is what the residual connection keeps of token i: x
    enters the layer's block, m is behind the addition of attention. A row without either is handed on as it is. The
    map is the sum of the rows below all layers. The score s is the margin of the class.

    Args:
        name: key of the map.
        label: name for people.
    """

    name: str = "gmarpp_balanced"
    label: str = "GMAR++ (balanced)"
    alpha: float = field(default=0.0, init=False, repr=False)
    relevance: ClassVar[Literal["attention", "product"]] = "product"
    gradient_rule: ClassVar[str] = "balanced"
    needs_residual: ClassVar[bool] = True
    is_summed: ClassVar[bool] = True

    @override
    def head_weights(self, layer: AttentionLayer) -> Tensor:
        return torch.ones_like(layer.equal_shares)


@dataclass(frozen=True)
class TokenRelevance(Method):
    """What each token says for the class or against it, in all layers: `Σ_l R_l(j) / Σ_j' |R_l(j')|`, signed.

    `R_l(j) = x_lj · ds/dx_lj` for the tokens x_l that enter block l, with the balanced gradient of the class's margin
    s; j and j' are patch tokens.

    Args:
        name: key of the map.
        label: name for people.
    """

    name: str = "token_relevance"
    label: str = "Token relevance"
    gradient_rule: ClassVar[str] = "balanced"
    needs_attention: ClassVar[bool] = False
    needs_tokens: ClassVar[bool] = True
    signed = True

    @override
    def start(self, readout: Tensor, images: Tensor, tokens: int) -> Tensor:
        return readout.new_zeros(len(readout), tokens)

    @override
    def step(self, row: Tensor, layer: AttentionLayer) -> Tensor:
        return row

    @override
    def receive(self, row: Tensor, relevance: Tensor, patches: slice) -> Tensor:
        total = relevance[:, patches].abs().sum(dim=1, keepdim=True)
        return row + relevance / total.where(total > 0, 1.0)


@dataclass(frozen=True)
class Chefer(Rollout):
    """Relevance propagation by gradients only: `M = I + mean_h ReLU(G ⊙ A)`, rows not normalized.

    Source: Chefer et al., "Generic Attention-Model Explainability for Interpreting Bi-Modal and Encoder-Decoder
    Transformers", ICCV 2021.
    """

    name: str = "chefer"
    label: str = "Chefer"
    needs_gradient: ClassVar[bool] = True
    relevance: ClassVar[Literal["attention", "product"]] = "product"
    normalized: ClassVar[bool] = False


@dataclass(frozen=True)
class LeGrad(Method):
    """Positive gradients of each layer's own score, averaged over heads, queries and layers.

    The score of layer l is the network's head applied to the tokens that leave layer l.

    Source: Bousselham et al., "LeGrad: An Explainability Method for Vision Transformers via Feature Formation
    Sensitivity", arXiv 2404.03214, 2024.
    """

    name: str = "legrad"
    label: str = "LeGrad"
    needs_gradient: ClassVar[bool] = False
    needs_local_gradient: ClassVar[bool] = True

    @override
    def start(self, readout: Tensor, images: Tensor, tokens: int) -> Tensor:
        return readout.new_zeros(len(readout), tokens)

    @override
    def step(self, row: Tensor, layer: AttentionLayer) -> Tensor:
        sums = layer.local_key_sums()
        if sums is None:
            return row
        return torch.add(row, sums, alpha=1 / (layer.query.shape[1] * layer.queries * layer.depth))


@dataclass(frozen=True)
class LastAttention(Method):
    """Attention of the readout in the last layer, averaged over heads."""

    name: str = "attention"
    label: str = "Attention"
    relevance: ClassVar[str] = "attention"
    needs_gradient: ClassVar[bool] = False

    @override
    def step(self, row: Tensor, layer: AttentionLayer) -> Tensor:
        if not layer.is_top:
            return layer.keep(row)
        rows = layer.equal_shares[..., None, None] * row[:, None, None]  # (B, H, 1, Q)
        attended, _ = layer.carry(rows, None)
        assert attended is not None
        return attended[:, 0]


@dataclass(frozen=True)
class RandomMap(Method):
    """Uniform random relevance, the control that every method must beat.

    The numbers depend only on the seed and the image's content, not on the batch.
    """

    name: str = "random"
    label: str = "Random"
    seed: int = 0
    needs_gradient: ClassVar[bool] = False
    needs_attention: ClassVar[bool] = False

    @override
    def start(self, readout: Tensor, images: Tensor, tokens: int) -> Tensor:
        return noise(images, tokens, self.seed)

    @override
    def step(self, row: Tensor, layer: AttentionLayer) -> Tensor:
        return row


def _check_norm(name: str, norm: int | None, choices: tuple[int | None, ...]) -> None:
    if norm not in choices:
        raise ValueError(f"{name}: unknown norm {norm!r}: choose from {', '.join(map(str, choices))}")
