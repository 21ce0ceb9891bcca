"""Methods of other libraries, registered by name: captum, grad-cam, and LRP by lxt with zennit's gamma rule.

Omitted are captum's LRP, which has no rules for attention, and RISE and LeGrad, which none of the libraries offers for
timm networks.
"""

import copy
from functools import partial

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from gmarpp import FunctionMethod, register_method

try:
    from captum.attr import InputXGradient, IntegratedGradients, Occlusion, Saliency
    from lxt.efficient import monkey_patch_zennit
    from lxt.efficient.patches import layer_norm_forward
    from lxt.efficient.rules import identity_rule_implicit, stop_gradient
    from pytorch_grad_cam import GradCAM
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
    from zennit.composites import LayerMapComposite
    from zennit.rules import Gamma
except ImportError as error:
    raise SystemExit(f"{error}. Install the other libraries: pip install -e '.[bench]'") from error

# Rules of zennit must pass on relevance divided by the input, as those of lxt do.
monkey_patch_zennit()

IG_STEPS = 16
CONV_GAMMA, LINEAR_GAMMA = 0.25, 0.05


def _by_patch(model: VisionTransformer, values: Tensor) -> Tensor:
    """Average values (B, C, H, W) over channels and over the pixels of each patch: (B, h, w)."""
    grid = model.patch_embed.dynamic_feat_size((values.shape[2], values.shape[3]))
    return F.adaptive_avg_pool2d(values.detach().mean(dim=1, keepdim=True), grid)[:, 0]


def saliency(model: VisionTransformer, images: Tensor, target: Tensor) -> Tensor:
    """Compute absolute gradients (captum), averaged over each patch."""
    return _by_patch(model, Saliency(model).attribute(images.clone().requires_grad_(), target=target))


def input_x_gradient(model: VisionTransformer, images: Tensor, target: Tensor) -> Tensor:
    """Compute signed input times gradient (captum), averaged over each patch."""
    return _by_patch(model, InputXGradient(model).attribute(images.clone().requires_grad_(), target=target))


def integrated_gradients(model: VisionTransformer, images: Tensor, target: Tensor) -> Tensor:
    """Compute signed Integrated Gradients (captum) from the training images' mean color, averaged over each patch."""
    method = IntegratedGradients(model)
    return _by_patch(model, method.attribute(images, target=target, n_steps=IG_STEPS, internal_batch_size=64))


def occlusion(model: VisionTransformer, images: Tensor, target: Tensor) -> Tensor:
    """Compute the loss of the logit when the mean color of the training images replaces one patch (captum)."""
    patch = (images.shape[1], *model.patch_embed.patch_size)
    method = Occlusion(model)
    return _by_patch(model, method.attribute(images, patch, strides=patch, target=target, perturbations_per_eval=4))


def grad_cam(model: VisionTransformer, images: Tensor, target: Tensor) -> Tensor:
    """Compute Grad-CAM at the last block's first norm (grad-cam), as in its tutorial for Vision Transformers."""

    def as_picture(tokens: Tensor) -> Tensor:
        grid = model.patch_embed.dynamic_feat_size((images.shape[2], images.shape[3]))
        return tokens[:, model.num_prefix_tokens :].mT.unflatten(-1, grid)

    with GradCAM(model, [model.blocks[-1].norm1], reshape_transform=as_picture) as method:
        values = method(images, [ClassifierOutputTarget(index) for index in target.tolist()])
    model.zero_grad()
    return _by_patch(model, torch.from_numpy(values)[:, None].to(images.device))


def attn_lrp(model: VisionTransformer, images: Tensor, target: Tensor, margin: bool = False) -> Tensor:
    """Compute LRP through attention with constant weights (lxt, zennit), signed, averaged over each patch.

    What it explains is the logit, as lxt does, or with `margin` the score of gmarpp's balanced methods: the logit minus
    the log-sum-exp of the others. lxt has rules for torchvision's networks; the same ones are put on a copy of the timm
    network: the identity rule on GELU and layer norm, no relevance through queries and keys, the gamma rule on linear
    and convolutional layers.
    """
    copied = _with_lrp_rules(model)
    composite = LayerMapComposite([(nn.Conv2d, Gamma(CONV_GAMMA)), (nn.Linear, Gamma(LINEAR_GAMMA))])
    inputs = images.clone().requires_grad_()
    with composite.context(copied) as modified:
        logits = modified(inputs)
        scores = logits.gather(1, target[:, None])
        if margin:
            scores = scores - logits.scatter(1, target[:, None], -torch.inf).logsumexp(dim=1, keepdim=True)
        total = scores.sum()
        (gradient,) = torch.autograd.grad(total, inputs)
    return _by_patch(model, inputs * gradient)


def _with_lrp_rules(model: VisionTransformer) -> VisionTransformer:
    copied = copy.deepcopy(model)
    for module in copied.modules():
        if isinstance(module, nn.LayerNorm):
            module.forward = partial(layer_norm_forward, module)
        elif isinstance(module, nn.GELU):
            module.forward = partial(identity_rule_implicit, module.forward)
    for block in copied.blocks:
        for norm in (block.attn.q_norm, block.attn.k_norm):
            norm.register_forward_hook(lambda _module, _inputs, output: stop_gradient(output))
    return copied


_METHODS = (
    FunctionMethod("saliency", saliency, "Saliency"),
    FunctionMethod("input_x_gradient", input_x_gradient, "Input x Gradient", signed=True),
    FunctionMethod(
        "integrated_gradients", integrated_gradients, f"Integrated Gradients ({IG_STEPS} steps)", signed=True
    ),
    FunctionMethod("occlusion", occlusion, "Occlusion", signed=True),
    FunctionMethod("grad_cam", grad_cam, "Grad-CAM"),
    FunctionMethod("attn_lrp", attn_lrp, "LRP (lxt)", signed=True),
    FunctionMethod("attn_lrp_margin", partial(attn_lrp, margin=True), "LRP (lxt) of the margin", signed=True),
)
for _method in _METHODS:
    register_method(_method)

OUTSIDE_METHODS = tuple(method.name for method in _METHODS)
"""Names of the methods, which are registered."""
