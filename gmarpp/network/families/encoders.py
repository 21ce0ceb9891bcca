"""Encoders of one resolution, from patch embedding to last block, of timm, torchvision, transformers and open_clip."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from timm.layers.attention_pool2d import AttentionPool2d
from timm.models.cait import Cait
from timm.models.convit import ConVit
from timm.models.volo import VOLO
from timm.models.volo import Transformer as VOLOTransformer
from timm.models.xcit import Xcit
from torch import Tensor, nn

from gmarpp.network.architecture import Architecture


def by_patch(size: Any) -> Callable[[int, int], tuple[int, int]]:
    """Return the grid (h, w) of an image's height and width for patches of a size, that of a side or of both."""
    height, width = _pair(size)
    return lambda image_height, image_width: (image_height // height, image_width // width)


def _pair(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def _has(model: object, *names: str) -> bool:
    return all(hasattr(model, name) for name in names)


def _is_timm(model: nn.Module) -> bool:
    return _has(model, "blocks", "num_prefix_tokens") and _timm_embedding(model) is not None


def _timm_embedding(model: Any) -> Any:
    """Return what makes patches; NaFlexViT names it otherwise, and Gemma 4's tells the size of patches only."""
    embedding = getattr(model, "patch_embed", getattr(model, "embeds", None))
    known = hasattr(embedding, "dynamic_feat_size") or type(embedding).__name__ == "Gemma4PatchEmbed"
    return embedding if known else None


def _timm(model: Any) -> Architecture:
    embedding = _timm_embedding(model)
    by_size = getattr(embedding, "dynamic_feat_size", None)
    # Encoders of language models have a final norm elsewhere, or none.
    has_head = _has(model, "norm", "forward_head", "reset_classifier")
    return Architecture(
        grid=(lambda *size: _pair(by_size(size))) if by_size else by_patch(embedding.patch_size),
        prefix_tokens=model.num_prefix_tokens,
        blocks=list(model.blocks),
        head=(lambda tokens: model.forward_head(model.norm(tokens))) if has_head else None,
    )


def _timm_convit(model: Any) -> Architecture:
    enters = model.local_up_to_layer < len(model.blocks)
    return replace(_timm(model), prefix_tokens=int(enters), prefix_from=model.local_up_to_layer if enters else 0)


def _timm_cait(model: Any) -> Architecture:
    # The layers of class attention, whose blocks take the class token beside the patches, are what follows the blocks.
    return replace(_timm(model), head=None, prefix_from=len(model.blocks))


def _timm_xcit(model: Any) -> Architecture:
    # Its other blocks attend between channels, and hand relevance on place by place.
    return Architecture(
        grid=by_patch(model.patch_embed.patch_size),
        prefix_tokens=1,
        blocks=list(model.cls_attn_blocks),
        head=lambda tokens: model.forward_head(model.norm(tokens)),
    )


def _timm_volo(model: Any) -> Architecture:
    # Outlook attention, of places next to each other, comes before, and the class token after these blocks.
    blocks = [block for stage in model.network for block in stage.children() if isinstance(block, VOLOTransformer)]
    stem, side = model.patch_embed, model.patch_embed.proj.stride[0] * model.pooling_scale
    side *= 1 if stem.conv is None else stem.conv[0].stride[0]
    class_blocks = list(model.post_network or ())
    return Architecture(
        grid=by_patch(side),
        prefix_tokens=1 if class_blocks else 0,
        blocks=[*blocks, *class_blocks],
        prefix_from=len(blocks) if class_blocks else 0,
    )


def _timm_attention_pool(model: Any) -> Architecture:
    # The pool of a convolutional network, whose tokens are their mean and the places of the last grid.
    return Architecture(grid=by_patch(model.feature_info[-1]["reduction"]), prefix_tokens=1)


def _is_torchvision(model: nn.Module) -> bool:
    return _has(model, "conv_proj", "encoder", "heads", "class_token", "patch_size")


def _torchvision(model: Any) -> Architecture:
    return Architecture(
        grid=by_patch(model.patch_size),
        prefix_tokens=1,
        blocks=list(model.encoder.layers),
        head=lambda tokens: model.heads(model.encoder.ln(tokens)[:, 0]),
    )


def _is_open_clip(model: nn.Module) -> bool:
    return _has(model, "conv1", "class_embedding", "transformer", "ln_post", "_pool")


def _open_clip(model: Any) -> Architecture:
    return Architecture(grid=by_patch(model.patch_size), prefix_tokens=1, blocks=list(model.transformer.resblocks))


# What transformers calls the parameters of its embeddings that become tokens before and after the patches.
_PREFIX_TOKENS = ("cls_token", "class_embedding", "distillation_token", "register_tokens")
_SUFFIX_TOKENS = ("detection_tokens",)
_BLOCKS = ("encoder.layers", "encoder.layer", "layers", "layer", "model.layer")


def _hugging_face_blocks(model: nn.Module) -> Sequence[nn.Module]:
    modules = dict(model.named_modules())
    found = (modules[name] for name in _BLOCKS if isinstance(modules.get(name), nn.ModuleList))
    return list(next(found, ()))


def _is_hugging_face(model: nn.Module) -> bool:
    """Return whether this is an encoder of transformers, from patch embeddings to the last of blocks of one size."""
    config, embeddings = getattr(model, "config", None), getattr(model, "embeddings", None)
    names = ("patch_embedding", "patch_embeddings", "patch_embed")
    patches = next((getattr(embeddings, name) for name in names if hasattr(embeddings, name)), None)
    # Pyramids (Swin, for example) have several depths; networks for videos or sound make patches of other kinds.
    in_rows = isinstance(patches, nn.Module) and any(isinstance(each, nn.Conv2d) for each in patches.modules())
    in_rows = in_rows or type(embeddings).__name__ == "Siglip2VisionEmbeddings"
    return in_rows and hasattr(config, "patch_size") and not hasattr(config, "depths") and _is_flat(model)


def _is_flat(model: Any) -> bool:
    layers: object = model.config.num_hidden_layers
    return 0 < len(_hugging_face_blocks(model)) == layers


def _hugging_face(
    model: Any,
    grid: Callable[..., tuple[int, ...]] | None = None,
    pictures: Callable[[Tensor], Tensor] | None = None,
) -> Architecture:
    def count(names: Sequence[str]) -> int:
        tokens = [getattr(model.embeddings, name, None) for name in names]
        return sum(1 if each.dim() == 1 else each.shape[-2] for each in tokens if isinstance(each, Tensor))

    return Architecture(
        grid=grid or by_patch(model.config.patch_size),
        prefix_tokens=count(_PREFIX_TOKENS),
        blocks=_hugging_face_blocks(model),
        suffix_tokens=count(_SUFFIX_TOKENS),
        pictures=pictures,
    )


def _tubelets(model: Any) -> Any:
    """Return what makes patches of several frames in an encoder of transformers; `None` in other networks."""
    embeddings = getattr(model, "embeddings", None)
    if not isinstance(embeddings, nn.Module) or not hasattr(getattr(model, "config", None), "tubelet_size"):
        return None
    found = [each for each in embeddings.modules() if isinstance(each, nn.Conv3d)]
    return found[0] if len(found) == 1 and found[0].kernel_size == found[0].stride and _is_flat(model) else None


def _hugging_face_video(model: Any) -> Architecture:
    strides = _tubelets(model).stride
    return _hugging_face(
        model,
        grid=lambda *size: tuple(side // stride for side, stride in zip(size, strides, strict=True)),
        pictures=lambda clips: clips.transpose(1, 2),
    )


def _is_hugging_face_sound(model: nn.Module) -> bool:
    config = getattr(model, "config", None)
    return _has(model, "embeddings") and _has(config, "num_mel_bins", "frequency_stride", "time_stride")


def _hugging_face_sound(model: Any) -> Architecture:
    side, strides = model.config.patch_size, (model.config.frequency_stride, model.config.time_stride)
    return _hugging_face(
        model,
        # Patches may overlap.
        grid=lambda *size: tuple((each - side) // stride + 1 for each, stride in zip(size, strides, strict=True)),
        # Spectrograms come as (B, time, frequency).
        pictures=lambda spectrograms: spectrograms.mT[:, None],
    )


FAMILIES: tuple[tuple[Callable[[nn.Module], bool], Callable[[Any], Architecture]], ...] = (
    (lambda model: isinstance(model, Cait), _timm_cait),
    (lambda model: isinstance(model, ConVit), _timm_convit),
    (lambda model: isinstance(model, Xcit), _timm_xcit),
    (lambda model: isinstance(model, VOLO), _timm_volo),
    (lambda model: isinstance(getattr(model, "head", None), AttentionPool2d), _timm_attention_pool),
    (_is_timm, _timm),
    (_is_torchvision, _torchvision),
    (_is_hugging_face_sound, _hugging_face_sound),
    (_is_hugging_face, _hugging_face),
    (lambda model: _tubelets(model) is not None, _hugging_face_video),
    (_is_open_clip, _open_clip),
)
"""How a network is told to be of a family, and what describes it, in the order in which they are asked."""
