"""Facts about a network beyond its attention calls: patch grid, prefix tokens and blocks, by family.

Maps need the grid and the number of tokens around the patches; LeGrad and recomputation need the blocks too. A network
of a family that is not listed here is described by hand with `Architecture`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

from timm.models.fastvit import AttentionBlock as FastVitAttention
from timm.models.fastvit import FastVit
from timm.models.maxxvit import MaxxVit, MaxxVitBlock
from timm.models.metaformer import Attention as MetaFormerAttention
from timm.models.metaformer import MetaFormer
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from timm.models.tiny_vit import TinyVit
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torchvision.models import MaxVit as TorchvisionMaxVit
from torchvision.models import SwinTransformer as TorchvisionSwinTransformer

from gmarpp.network import hybrid, swin
from gmarpp.network.errors import UnsupportedNetworkError
from gmarpp.network.transport import Grid, Step


@dataclass(frozen=True)
class Architecture:
    """The token layout of a Vision Transformer.

    Attributes:
        grid: returns the patch grid (h, w) of an image of a given height and width in pixels.
        prefix_tokens: number of tokens before the patch tokens (class, distillation and register tokens).
        blocks: the transformer blocks, from the input upward.
        head: what the network computes from the tokens that leave the last block, shape (B, N, D), up to its output.
            Only a shortcut: without it, or where the network does something else, LeGrad runs the network itself again
            with its blocks skipped.
        suffix_tokens: number of tokens after the patch tokens (detection tokens).
        transport: returns, for an image of a given height and width in pixels, over which tokens each block attends;
            `None` if all blocks attend over all tokens. Maps are on the finest grid, which `grid` returns.
        fused: attention modules that write their attention out, and for each a forward that computes the same by
            `scaled_dot_product_attention`.
        channels_first: whether blocks are given tokens as (B, D, h, w), and not as (B, N, D) or (B, h, w, D).
    """

    grid: Callable[[int, int], tuple[int, int]]
    prefix_tokens: int
    blocks: Sequence[nn.Module] = ()
    head: Callable[[Tensor], Any] | None = None
    suffix_tokens: int = 0
    transport: Callable[[int, int], Sequence[Step]] | None = None
    fused: Mapping[nn.Module, Callable[..., Any]] = field(default_factory=dict)
    channels_first: bool = False

    def patches(self, tokens: int) -> slice:
        """Return where the patch tokens are among all of a number of tokens."""
        return slice(self.prefix_tokens, tokens - self.suffix_tokens)


def architecture_of(model: nn.Module) -> Architecture:
    """Describe a network of a known family, or the only one inside another: timm, torchvision, transformers, open_clip.

    What a wrapper adds, such as a head of its own, is no part of the description.

    Raises:
        UnsupportedNetworkError: if there is no such network, or more than one; the message says what to do.
    """
    known = list(_known_networks(model))
    if not known:
        raise _unknown(model)
    if len(known) > 1:
        names = [f"{name} ({type(network).__name__})" for name, network, _ in known]
        raise UnsupportedNetworkError(
            f"{type(model).__name__} holds {len(known)} networks of known families: {', '.join(names)}. Name the one "
            f"to explain: architecture=gmarpp.architecture_of(model.get_submodule({known[0][0]!r}))"
        )
    ((name, network, describe),) = known
    layout = describe(network)
    return layout if name == "" else replace(layout, head=None)


def _unknown(model: nn.Module) -> UnsupportedNetworkError:
    kinds = {type(module).__name__.lower() for module in model.modules()}
    if not any(word in kind for kind in kinds for word in ("attention", "attn", "transformer")):
        return UnsupportedNetworkError(
            f"{type(model).__name__} is not known to attend between places of the image: these methods explain Vision "
            "Transformers. One whose modules have other names is described by architecture=gmarpp.Architecture(...)"
        )
    return UnsupportedNetworkError(
        f"the patch grid of {type(model).__name__} is not known. If it is a ViT with global attention, pass "
        "architecture=gmarpp.Architecture(grid=..., prefix_tokens=..., blocks=...). Other networks with "
        "windowed or pyramid attention (PVT, Hiera, SAM), and those with attention between channels (XCiT), cannot be "
        "explained by these methods: use a ViT, Swin or MaxViT"
    )


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the network inside `DataParallel`, `DistributedDataParallel` and `torch.compile`.

    The first would run copies of it in other threads, the second wait for the other processes; compiled code is not
    run while a network is explained.
    """
    while True:
        if isinstance(model, DataParallel | DistributedDataParallel):
            model = model.module
        elif isinstance(compiled := model._modules.get("_orig_mod"), nn.Module):
            model = compiled
        else:
            return model


def _known_networks(
    model: nn.Module, name: str = "", met: set[nn.Module] | None = None
) -> Iterator[tuple[str, nn.Module, Callable[[Any], Architecture]]]:
    """Find the outermost networks of known families: name inside the model, network, and what describes it."""
    met = set() if met is None else met
    if model in met:
        return
    met.add(model)
    describe = next((describe for matches, describe in _FAMILIES if matches(model)), None)
    if describe is not None:
        yield name, model, describe
        return
    for child, network in model.named_children():
        yield from _known_networks(network, f"{name}.{child}" if name else child, met)


def _by_patch(size: Any) -> Callable[[int, int], tuple[int, int]]:
    height, width = _pair(size)
    return lambda image_height, image_width: (image_height // height, image_width // width)


def _pair(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def _has(model: nn.Module, *names: str) -> bool:
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
        grid=(lambda *size: _pair(by_size(size))) if by_size else _by_patch(embedding.patch_size),
        prefix_tokens=model.num_prefix_tokens,
        blocks=list(model.blocks),
        head=(lambda tokens: model.forward_head(model.norm(tokens))) if has_head else None,
    )


def _is_torchvision(model: nn.Module) -> bool:
    return _has(model, "conv_proj", "encoder", "heads", "class_token", "patch_size")


def _torchvision(model: Any) -> Architecture:
    return Architecture(
        grid=_by_patch(model.patch_size),
        prefix_tokens=1,
        blocks=list(model.encoder.layers),
        head=lambda tokens: model.heads(model.encoder.ln(tokens)[:, 0]),
    )


def _is_open_clip(model: nn.Module) -> bool:
    return _has(model, "conv1", "class_embedding", "transformer", "ln_post", "_pool")


def _open_clip(model: Any) -> Architecture:
    return Architecture(grid=_by_patch(model.patch_size), prefix_tokens=1, blocks=list(model.transformer.resblocks))


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


def _hugging_face(model: Any) -> Architecture:
    def count(names: Sequence[str]) -> int:
        tokens = [getattr(model.embeddings, name, None) for name in names]
        return sum(1 if each.dim() == 1 else each.shape[-2] for each in tokens if isinstance(each, Tensor))

    return Architecture(
        grid=_by_patch(model.config.patch_size),
        prefix_tokens=count(_PREFIX_TOKENS),
        blocks=_hugging_face_blocks(model),
        suffix_tokens=count(_SUFFIX_TOKENS),
    )


def _timm_swin(model: Any) -> Architecture:
    is_second = isinstance(model, SwinTransformerV2)
    stages = [list(stage.blocks) for stage in model.layers]
    fused = swin.timm_cosine_attention if is_second else swin.timm_attention
    return _in_stages(
        lambda *size: _pair(model.patch_embed.dynamic_feat_size(size)),
        stages,
        swin.timm_step,
        {block.attn: fused(block.attn) for stage in stages for block in stage},
    )


def _torchvision_swin(model: Any) -> Architecture:
    # An embedding, and then, by turns, the blocks of a stage and what merges tokens.
    embedding, *layers = model.features
    stages = [list(stage) for stage in layers[::2]]
    fused = {block.attn: swin.torchvision_attention(block.attn) for stage in stages for block in stage}
    return _in_stages(_by_patch(embedding[0].stride), stages, swin.torchvision_step, fused)


def _hugging_face_swin(model: Any) -> Architecture:
    side = model.config.patch_size
    stages = [list(stage.blocks) for stage in model.encoder.layers]
    return _in_stages(lambda *size: _merged(size, side), stages, swin.hugging_face_step)


def _is_timm_maxvit(model: nn.Module) -> bool:
    # Others of this class attend over all tokens in some stages (CoAtNet), in other layouts, or in parallel.
    blocks = [block for stage in model.stages for block in stage.blocks] if isinstance(model, MaxxVit) else []
    return bool(blocks) and all(isinstance(block, MaxxVitBlock) and not block.nchw_attn for block in blocks)


def _timm_maxvit(model: Any) -> Architecture:
    # The stem and the first stage halve the image each.
    stages = [hybrid.maxvit_partitions(stage) for stage in model.stages]
    return _in_stages(lambda *size: _merged(size, 4), stages, hybrid.maxvit_step)


def _timm_tiny_vit(model: Any) -> Architecture:
    # The stem halves the image twice; the first stage is one of convolutions.
    stages = [list(stage.blocks) for stage in model.stages[1:]]
    return _in_stages(lambda *size: _merged(size, 8), stages, hybrid.tiny_vit_step)


def _torchvision_maxvit(model: Any) -> Architecture:
    # The stem and the first stage halve the image each.
    layers = [[each.layers for each in stage.layers] for stage in model.blocks]
    stages = [[each for layer in stage for each in (layer.window_attention, layer.grid_attention)] for stage in layers]
    attentions = [partition.attn_layer[1] for stage in stages for partition in stage]
    fused = {each: hybrid.torchvision_maxvit_attention(each) for each in attentions}
    found = _in_stages(lambda *size: _merged(size, 4), stages, hybrid.torchvision_maxvit_step, fused)
    return replace(found, channels_first=True)


def _fast_vit_stages(model: Any) -> list[Any]:
    return [stage for stage in model.stages if isinstance(stage.blocks[0], FastVitAttention)]


def _timm_fast_vit(model: Any) -> Architecture:
    stages = [list(stage.blocks) for stage in _fast_vit_stages(model)]
    reduction = model.feature_info[-len(stages)]["reduction"]
    found = _in_stages(lambda *size: _merged(size, reduction), stages, hybrid.whole_step)
    return replace(found, channels_first=True)


def _attending_stages(model: Any) -> list[Any]:
    return [stage for stage in model.stages if isinstance(stage.blocks[0].token_mixer, MetaFormerAttention)]


def _timm_caformer(model: Any) -> Architecture:
    stages = [list(stage.blocks) for stage in _attending_stages(model)]
    convolutional = len(model.stages) - len(stages)
    # The stem has patches of 7 x 7 pixels at every fourth pixel, from 2 pixels outside the image.
    return _in_stages(
        lambda *size: _merged([(side + 1) // 4 for side in size], 2**convolutional), stages, hybrid.whole_step
    )


def _merged(sides: Sequence[int], stride: int) -> Grid:
    height, width = (-(-side // stride) for side in sides)
    return height, width


def _in_stages(
    grid: Callable[[int, int], Grid],
    stages: Sequence[Sequence[nn.Module]],
    step: Callable[[Any, Grid], Step],
    fused: Mapping[nn.Module, Callable[..., Any]] = MappingProxyType({}),
) -> Architecture:
    """Describe a network of several stages, with half as many tokens along each side from stage to stage."""

    def transport(*size: int) -> list[Step]:
        grids = [grid(*size)]
        for _ in stages[1:]:
            grids.append(_merged(grids[-1], 2))
        return [step(block, each) for stage, each in zip(stages, grids, strict=True) for block in stage]

    blocks = [block for stage in stages for block in stage]
    return Architecture(grid, prefix_tokens=0, blocks=blocks, transport=transport, fused=fused)


_FAMILIES: tuple[tuple[Callable[[nn.Module], bool], Callable[[Any], Architecture]], ...] = (
    (_is_timm, _timm),
    (_is_torchvision, _torchvision),
    (_is_hugging_face, _hugging_face),
    (_is_open_clip, _open_clip),
    (lambda model: isinstance(model, SwinTransformer | SwinTransformerV2), _timm_swin),
    (lambda model: isinstance(model, TorchvisionSwinTransformer), _torchvision_swin),
    (lambda model: type(model).__name__ == "SwinModel" and _has(model, "config", "encoder"), _hugging_face_swin),
    (_is_timm_maxvit, _timm_maxvit),
    (lambda model: isinstance(model, TorchvisionMaxVit), _torchvision_maxvit),
    (lambda model: isinstance(model, TinyVit), _timm_tiny_vit),
    (lambda model: isinstance(model, FastVit) and bool(_fast_vit_stages(model)), _timm_fast_vit),
    (lambda model: isinstance(model, MetaFormer) and bool(_attending_stages(model)), _timm_caformer),
)
