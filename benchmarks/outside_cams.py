"""Maps of torchcam and legrad-torch, each on a kind of network that it accepts."""

import contextlib
import copy
import sys
from collections.abc import Callable
from functools import partial

import torch
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn
from torchvision.models import VisionTransformer as TorchvisionTransformer

try:
    import legrad
    import open_clip
    import torchcam.methods
except ImportError as error:
    raise SystemExit(f"{error}. Install the other libraries: pip install -e '.[bench]'") from error


def torchcam_grad_cam(model: VisionTransformer, images: Tensor, target: Tensor) -> list[Tensor]:
    """Compute Grad-CAM at the last block's first norm by torchcam."""

    def as_picture(tokens: Tensor) -> Tensor:
        return tokens[:, model.num_prefix_tokens :].mT.unflatten(-1, model.patch_embed.grid_size)

    with torchcam.methods.GradCAM(model, model.blocks[-1].norm1, reshape_transform=as_picture) as cam:
        return cam(target.tolist(), model(images))


def torchvision_twin(model: VisionTransformer, size: int) -> TorchvisionTransformer:
    """Make a torchvision network of the same shape, with random weights."""
    twin = TorchvisionTransformer(
        image_size=size,
        patch_size=model.patch_embed.patch_size[0],
        num_layers=len(model.blocks),
        num_heads=model.blocks[0].attn.num_heads,
        hidden_dim=model.embed_dim,
        mlp_dim=model.blocks[0].mlp.fc1.out_features,
        num_classes=model.num_classes,
    )
    # The zeros of torchvision would make every gradient zero.
    nn.init.normal_(twin.heads.head.weight, std=0.02)
    return twin.eval()


def torchcam_legrad(model: TorchvisionTransformer, images: Tensor, target: Tensor) -> list[Tensor]:
    """Compute LeGrad of all layers by torchcam, for torchvision networks; its scores read the mean of all tokens."""
    with torchcam.methods.LeGrad(model, list(model.encoder.layers)) as cam:
        model(images)
        return cam(target.tolist())


def clip_twins(model: VisionTransformer, size: int, image: Tensor) -> tuple[nn.Module, VisionTransformer]:
    """Make a CLIP whose image tower has the same shape, with random weights, and the same tower as a timm network.

    Raises:
        AssertionError: the two towers do not agree on the image, (1, 3, H, W).
    """
    depth, width, heads = len(model.blocks), model.embed_dim, model.blocks[0].attn.num_heads
    patch = model.patch_embed.patch_size[0]
    vision = {"image_size": size, "patch_size": patch, "layers": depth, "width": width, "head_width": width // heads}
    text = {"context_length": 8, "vocab_size": 64, "width": 64, "heads": 1, "layers": 1}
    clip = open_clip.CLIP(embed_dim=512, vision_cfg=vision, text_cfg=text).eval().to(image.device)
    twin = VisionTransformer(
        img_size=size,
        patch_size=patch,
        embed_dim=width,
        depth=depth,
        num_heads=heads,
        pre_norm=True,
        norm_layer=partial(nn.LayerNorm, eps=1e-5),
        num_classes=512,
    )
    twin = twin.eval().to(image.device)
    weights = {f"visual.{name}": weight for name, weight in clip.visual.state_dict().items()}
    twin.load_state_dict(checkpoint_filter_fn(weights, twin))
    with torch.no_grad():
        torch.testing.assert_close(twin(image), clip.visual(image), rtol=1e-3, atol=1e-4)
    return clip, twin


def legrad_torch(clip: nn.Module, image: Tensor, text: Tensor, first_layer: int) -> Callable[[], Tensor]:
    """Prepare LeGrad by legrad-torch, which accepts one image at a time.

    Args:
        clip: open_clip network, which is copied: legrad-torch changes its modules.
        image: (1, 3, H, W).
        text: embedding of a prompt, (1, D).
        first_layer: lowest layer whose gradient counts; legrad-torch's default is -2, the last two.
    """
    with contextlib.redirect_stdout(sys.stderr):
        wrapper = legrad.LeWrapper(copy.deepcopy(clip), layer_index=first_layer)
    return partial(wrapper.compute_legrad, text, image)
