"""The procedure first published for GMAR++, restated for timing on a timm network.

It explains and scores one image at a time with unfused attention. A map keeps the attention matrix of every layer with
its gradient, differentiates all parameters, and multiplies whole N x N matrices in the order 1 ... L. The metrics score
logits of single images, whose pixels change in groups of a hundredth of the image that do not follow the patches;
every metric scores the image, and every curve the baseline, again: 210 scored images at 224 pixels.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torchvision.transforms.functional import gaussian_blur

STEPS = 100


@contextmanager
def unfused(model: VisionTransformer) -> Iterator[None]:
    """Make the network compute its attention matrices, which the procedure reads."""
    for block in model.blocks:
        block.attn.fused_attn = False
    try:
        yield
    finally:
        for block in model.blocks:
            block.attn.fused_attn = True


def gmarpp(model: VisionTransformer, image: Tensor, label: int) -> Tensor:
    """Compute GMAR++ (L1) of one image, (1, 3, H, W), for one class: (h, w) in [0, 1]."""
    attentions: list[Tensor] = []

    def keep(_: torch.nn.Module, args: tuple[Tensor]) -> None:
        args[0].retain_grad()
        attentions.append(args[0])

    handles = [block.attn.attn_drop.register_forward_pre_hook(keep) for block in model.blocks]
    with unfused(model):
        logits = model(image)
    for handle in handles:
        handle.remove()
    model.zero_grad()
    logits[0, label].backward(retain_graph=True)
    identity = torch.eye(attentions[0].shape[-1], device=image.device)
    rollout = identity
    for attention in attentions:
        assert attention.grad is not None
        positive = attention.grad.clamp(min=0)
        norms = positive.sum(dim=(-2, -1))
        weights = norms / norms.sum(dim=-1, keepdim=True)
        relevance = (weights[..., None, None] * positive * attention.detach()).sum(dim=1)[0] + identity
        rollout = rollout @ (relevance / relevance.sum(dim=-1, keepdim=True))
    map_ = rollout[0, model.num_prefix_tokens :].view(model.patch_embed.grid_size)
    return (map_ - map_.min()) / (map_.max() - map_.min() + 1e-8)


class _Metrics:
    """One map of one image under the five metrics; each method computes everything again."""

    def __init__(self, model: VisionTransformer, image: Tensor, map_: Tensor, label: int) -> None:
        self.model = model
        self.image = image
        self.label = label
        self.heat = F.interpolate(map_[None, None], image.shape[-2:], mode="nearest")[0, 0]

    def baseline(self) -> Tensor:
        return gaussian_blur(self.image, kernel_size=21, sigma=7.0)

    def logits(self, image: Tensor) -> Tensor:
        logits: Tensor = self.model(image)[0]
        return logits

    def logit(self, image: Tensor) -> float:
        return self.logits(image)[self.label].item()

    def kept_region(self) -> Tensor:
        kept = self.heat >= torch.quantile(self.heat.flatten(), 0.75)
        return torch.where(kept, self.image, self.baseline())

    def drop_and_increase(self) -> tuple[float, float]:
        full, kept = self.logit(self.image), self.logit(self.kept_region())
        return 100 * max(0.0, full - kept) / (abs(full) + 1e-8), float(kept > full)

    def gain(self) -> float:
        full, kept = (
            self.logits(image).softmax(dim=0)[self.label].item() for image in (self.image, self.kept_region())
        )
        return 100 * max(0.0, kept - full) / max(1e-8, 1 - full)

    def auc(self, insertion: bool) -> float:
        baseline = self.baseline()
        full, empty = self.logit(self.image), self.logit(baseline)
        canvas, source = (baseline.clone(), self.image) if insertion else (self.image.clone(), baseline)
        order = self.heat.flatten().argsort(descending=True)
        fractions, scores, changed = [0.0], [empty if insertion else full], 0
        for pixels in order.split(max(1, len(order) // STEPS)):
            rows, columns = pixels // canvas.shape[-1], pixels % canvas.shape[-1]
            canvas[:, :, rows, columns] = source[:, :, rows, columns]
            changed += len(pixels)
            fractions.append(changed / len(order))
            scores.append(self.logit(canvas))
        curve = ((torch.tensor(scores) - empty) / max(1e-8, full - empty)).clamp(0, 1)
        return torch.trapezoid(curve, torch.tensor(fractions)).item()


@torch.no_grad()
def faithfulness(model: VisionTransformer, image: Tensor, map_: Tensor, label: int) -> dict[str, float]:
    """Score one map, (h, w), of one image, (1, 3, H, W), by the five metrics."""
    metrics = _Metrics(model, image, map_, label)
    with unfused(model):
        drop, increase = metrics.drop_and_increase()
        return {
            "average_drop": drop,
            "average_increase": increase,
            "average_gain": metrics.gain(),
            "insertion_auc": metrics.auc(insertion=True),
            "deletion_auc": metrics.auc(insertion=False),
        }
