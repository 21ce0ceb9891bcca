"""Facts about a network beyond its attention calls: patch grid, prefix tokens, blocks and head by family.

Most methods need the grid and the number of prefix tokens only; LeGrad and recomputation need the blocks, LeGrad the
head too. A network of a family that is not listed here is described by hand with `Architecture`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gmarpp.network.errors import UnsupportedNetworkError


@dataclass(frozen=True)
class Architecture:
    """The token layout of a Vision Transformer.

    Attributes:
        grid: returns the patch grid (h, w) of an image of a given height and width in pixels.
        prefix_tokens: number of tokens before the patch tokens (class, distillation and register tokens).
        blocks: the transformer blocks, from the input upward; each calls attention once.
        head: what the network computes from the tokens that leave the last block, shape (B, N, D), up to its output.
    """

    grid: Callable[[int, int], tuple[int, int]]
    prefix_tokens: int
    blocks: Sequence[nn.Module] = ()
    head: Callable[[Tensor], Any] | None = None


def architecture_of(model: nn.Module) -> Architecture:
    """Describe a network of a known family: timm, torchvision, Hugging Face or open_clip.

    Raises:
        UnsupportedNetworkError: if the family is not known; the message says how to describe it by hand.
    """
    for matches, describe in _FAMILIES:
        if matches(model):
            return describe(model)
    raise UnsupportedNetworkError(
        f"the patch grid of {type(model).__name__} is not known. If it is a ViT with global attention, pass "
        "architecture=gmarpp.Architecture(grid=..., prefix_tokens=..., blocks=..., head=...), or "
        "architecture=gmarpp.architecture_of(network.vit) when it wraps one of a known family (timm, torchvision, "
        "Hugging Face, open_clip). Networks with windowed or pyramid attention (Swin, PVT, MaxViT), with attention "
        "between channels (XCiT) and convolutional ones cannot be explained by these methods: use a ViT"
    )


def _by_patch(height: int, width: int) -> Callable[[int, int], tuple[int, int]]:
    return lambda image_height, image_width: (image_height // height, image_width // width)


def _pair(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def _is_timm(model: nn.Module) -> bool:
    parts = ("patch_embed", "blocks", "norm", "forward_head", "num_prefix_tokens")
    return all(hasattr(model, name) for name in parts) and hasattr(model.patch_embed, "dynamic_feat_size")


def _timm(model: Any) -> Architecture:
    return Architecture(
        grid=lambda height, width: _pair(model.patch_embed.dynamic_feat_size((height, width))),
        prefix_tokens=model.num_prefix_tokens,
        blocks=list(model.blocks),
        head=lambda tokens: model.forward_head(model.norm(tokens)),
    )


def _is_torchvision(model: nn.Module) -> bool:
    return all(hasattr(model, name) for name in ("conv_proj", "encoder", "heads", "class_token", "patch_size"))


def _torchvision(model: Any) -> Architecture:
    return Architecture(
        grid=_by_patch(*_pair(model.patch_size)),
        prefix_tokens=1,
        blocks=list(model.encoder.layers),
        head=lambda tokens: model.heads(model.encoder.ln(tokens)[:, 0]),
    )


def _is_open_clip(model: nn.Module) -> bool:
    return all(hasattr(model, name) for name in ("conv1", "class_embedding", "transformer", "ln_post", "_pool"))


def _open_clip(model: Any) -> Architecture:
    def head(tokens: Tensor) -> Any:
        pooled, _ = model._pool(tokens)
        return pooled if model.proj is None else pooled @ model.proj

    return Architecture(
        grid=_by_patch(*_pair(model.patch_size)),
        prefix_tokens=1,
        blocks=list(model.transformer.resblocks),
        head=head,
    )


def _is_open_clip_timm(model: nn.Module) -> bool:
    return (
        isinstance(getattr(model, "trunk", None), nn.Module)
        and hasattr(model, "head")
        and _is_timm(model.get_submodule("trunk"))
    )


def _open_clip_timm(model: Any) -> Architecture:
    trunk = _timm(model.trunk)
    assert trunk.head is not None
    pool = trunk.head
    return Architecture(trunk.grid, trunk.prefix_tokens, trunk.blocks, head=lambda tokens: model.head(pool(tokens)))


def _class_token(model: Any, tokens: Tensor) -> Any:
    return model.classifier(tokens[:, 0])


def _both_tokens(model: Any, tokens: Tensor) -> Any:
    return (model.cls_classifier(tokens[:, 0]) + model.distillation_classifier(tokens[:, 1])) / 2


def _class_token_and_mean_patch(model: Any, tokens: Tensor) -> Any:
    first_patch = 1 + getattr(model.config, "num_register_tokens", 0)
    return model.classifier(torch.cat((tokens[:, 0], tokens[:, first_patch:].mean(dim=1)), dim=1))


def _mean_token(model: Any, tokens: Tensor) -> Any:
    return model.classifier(tokens.mean(dim=1))


@dataclass(frozen=True)
class _HuggingFace:
    """Where a Hugging Face classifier keeps its parts: encoder, final norm, and what follows the norm."""

    encoder: str
    prefix_tokens: int
    pool: Callable[[Any, Tensor], Any]
    norm: str = "layernorm"


_HUGGING_FACE = {
    "ViTForImageClassification": _HuggingFace("vit", 1, _class_token),
    "DeiTForImageClassification": _HuggingFace("deit", 2, _class_token),
    "DeiTForImageClassificationWithTeacher": _HuggingFace("deit", 2, _both_tokens),
    "Dinov2ForImageClassification": _HuggingFace("dinov2", 1, _class_token_and_mean_patch),
    "Dinov2WithRegistersForImageClassification": _HuggingFace("dinov2_with_registers", 1, _class_token_and_mean_patch),
    "SiglipForImageClassification": _HuggingFace("vision_model", 0, _mean_token, norm="post_layernorm"),
}


def _is_hugging_face(model: nn.Module) -> bool:
    return type(model).__name__ in _HUGGING_FACE and hasattr(model, "config")


def _hugging_face(model: Any) -> Architecture:
    parts = _HUGGING_FACE[type(model).__name__]
    base = getattr(model, parts.encoder)
    # transformers 5 moved some families' layers from base.encoder to base.
    stack = getattr(base, "encoder", base)
    config = getattr(model.config, "vision_config", model.config)
    return Architecture(
        grid=_by_patch(*_pair(config.patch_size)),
        prefix_tokens=parts.prefix_tokens + getattr(config, "num_register_tokens", 0),
        blocks=list(stack.layers if hasattr(stack, "layers") else stack.layer),
        head=lambda tokens: parts.pool(model, getattr(base, parts.norm)(tokens)),
    )


_FAMILIES: tuple[tuple[Callable[[nn.Module], bool], Callable[[Any], Architecture]], ...] = (
    (_is_timm, _timm),
    (_is_torchvision, _torchvision),
    (_is_hugging_face, _hugging_face),
    (_is_open_clip, _open_clip),
    (_is_open_clip_timm, _open_clip_timm),
)
