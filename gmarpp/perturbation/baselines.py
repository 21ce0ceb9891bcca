"""What replaces a removed patch: blur, channel mean, black, or nothing at all (the token is dropped)."""

from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from gmarpp.attribution import UnsupportedNetworkError, architecture_of
from gmarpp.attribution.precision import close
from gmarpp.network.preprocessing import normalization_of

Baseline = Literal["blur", "mean", "black", "drop"]
BASELINES: tuple[str, ...] = get_args(Baseline)


def gaussian_blur(images: Tensor) -> Tensor:
    """Blur with a Gaussian that grows with the image: 21 px wide with sigma 7 where the shorter side is 224 px.

    Borders are reflected. Blurring commutes with per-channel normalization, so normalized images need no special care.

    Args:
        images: (B, C, H, W), at least 2 px a side.
    """
    side = min(images.shape[2:])
    radius, sigma = max(1, round(10 * side / 224)), 7 * side / 224
    offsets = torch.arange(-radius, radius + 1, device=images.device, dtype=torch.float32)
    kernel = torch.exp(-0.5 * (offsets / sigma) ** 2)
    kernel = (kernel / kernel.sum()).to(torch.promote_types(images.dtype, torch.float32))
    channels = images.shape[1]
    with torch.autocast(images.device.type, enabled=False):
        padded = F.pad(images.to(kernel.dtype), (radius,) * 4, mode="reflect")
        rows = F.conv2d(padded, kernel.view(1, 1, -1, 1).expand(channels, 1, -1, 1), groups=channels)
        blurred = F.conv2d(rows, kernel.view(1, 1, 1, -1).expand(channels, 1, 1, -1), groups=channels)
    return blurred.to(images.dtype)


def _black(model: nn.Module, images: Tensor) -> Tensor:
    normalization = normalization_of(model, images)
    if normalization is None:
        raise ValueError(
            f"baseline 'black' needs the normalization of the network's {images.shape[1]} input channels: set "
            "model.pretrained_cfg = {'mean': (…), 'std': (…)}, or use baseline 'blur', 'mean' or 'drop'"
        )
    mean, std = normalization
    return -mean / std


def baseline_images(model: nn.Module, images: Tensor, baseline: str) -> Tensor:
    """Return what replaces removed patches, one picture per image.

    Args:
        model: its normalization (`pretrained_cfg`) is read for `black` only.
        images: (B, C, H, W), normalized.
        baseline: `blur`, `mean` (the mean color of each image) or `black`.

    Returns:
        (B, C, H, W), or (B, C, 1, 1) where one color fills the picture.

    Raises:
        ValueError: `black` without `pretrained_cfg`.
    """
    if baseline == "blur":
        return gaussian_blur(images)
    if baseline == "mean":
        return images.mean((2, 3), keepdim=True)
    return _black(model, images).expand(len(images), images.shape[1], 1, 1)


class TokenDrop:
    """A timm Vision Transformer that sees only some patches: the others' tokens leave the sequence.

    There is no replacement and so no missingness bias (Jain et al. 2022), and shorter sequences cost less. Tokens
    keep the position embedding of their patch. Where all patches are dropped, prefix tokens (class, register) remain;
    a network that pools patch tokens only then has nothing to pool, and its head gets the zero vector before its own
    norm instead: its output without evidence.

    Args:
        model: timm `VisionTransformer` (learned or no position embedding; class, distillation, register tokens or
            pooling of any kind).
        images: (B, C, H, W), embedded once, at most `batch_size` at a time.
        grid: patch grid of the maps, which must be the network's own.

    Raises:
        UnsupportedNetworkError: another kind of network, or one that is changed from outside.
        ValueError: another patch grid.
    """

    def __init__(self, model: nn.Module, images: Tensor, grid: tuple[int, int], batch_size: int) -> None:
        supported = isinstance(model, VisionTransformer) and all(
            getattr(type(model), name) is getattr(VisionTransformer, name) for name in ("forward", "forward_features")
        )
        if not supported:
            raise UnsupportedNetworkError(
                f"baseline 'drop' removes tokens from a timm VisionTransformer without rotary or relative positions; "
                f"{type(model).__name__} is not one: use baseline 'blur', 'mean' or 'black'"
            )
        own_grid = architecture_of(model).grid(images.shape[2], images.shape[3])
        if grid != own_grid:
            raise ValueError(f"baseline 'drop': expected maps on the network's patch grid {own_grid}, got {grid}")
        self.model: Any = model
        if model._forward_hooks or model._forward_pre_hooks or "forward" in vars(model):
            self._require_same(images[:1])
        self.tokens = torch.cat([self._embed(chunk) for chunk in torch.split(images, batch_size)])
        reads_prefix = self.model.global_pool == "token" or self.model.pool_include_prefix
        self.reads_prefix = bool(self.model.num_prefix_tokens) and reads_prefix

    def _require_same(self, image: Tensor) -> None:
        """Refuse a network whose output hooks change, or a forward in place of its own: here only its parts run."""
        tokens = self.model.blocks(self._embed(image))
        expected, found = self.model(image), self.model.forward_head(self.model.norm(tokens))
        if not close(found, expected):
            raise UnsupportedNetworkError(
                f"baseline 'drop' runs the parts of {type(self.model).__name__}, and its hooks or its replaced forward "
                "make something else of them: use baseline 'blur', 'mean' or 'black'"
            )

    def _embed(self, images: Tensor) -> Tensor:
        tokens: Tensor = self.model.norm_pre(self.model._pos_embed(self.model.patch_embed(images)))
        return tokens

    def __call__(self, image: Tensor, keep: Tensor) -> Tensor:
        """Return logits of images of which only some patches are kept, the same number in every row.

        Args:
            image: (n,) long, positions of the images.
            keep: (n, h * w) bool.
        """
        patches = keep.nonzero()[:, 1].view(len(keep), -1)
        if patches.shape[1] == 0 and not self.reads_prefix:
            pooled = self.tokens.new_zeros(len(keep), self.tokens.shape[2])
            empty: Tensor = self.model.head(self.model.head_drop(self.model.fc_norm(pooled)))
            return empty
        prefix = torch.arange(self.model.num_prefix_tokens, device=patches.device).expand(len(keep), -1)
        index = torch.cat([prefix, patches + self.model.num_prefix_tokens], dim=1)
        tokens = self.model.blocks(self.tokens[image[:, None], index])
        logits: Tensor = self.model.forward_head(self.model.norm(tokens))
        return logits
