"""Facts about a network beyond its attention calls: patch grid, prefix tokens and blocks, by family.

Maps need the grid and the number of tokens around the patches; LeGrad and recomputation need the blocks too. A network
of a family that is not listed here is described by hand with `Architecture`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import import_module
from typing import Any

from timm.layers.attention_pool2d import AttentionPool2d
from timm.models.cait import Cait
from timm.models.convit import ConVit
from timm.models.volo import VOLO
from timm.models.volo import Transformer as VOLOTransformer
from timm.models.xcit import Xcit
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from gmarpp.network import hiera, levit, mvit, pooled, reduced, sam, stages
from gmarpp.network.errors import UnsupportedNetworkError
from gmarpp.network.refused import REFUSED, refusal
from gmarpp.network.transport import Step


@dataclass(frozen=True)
class Architecture:
    """The token layout of a Vision Transformer.

    Attributes:
        grid: returns the patch grid (h, w) of an image of a given height and width in pixels; or (t, h, w) of a video
            of a given number of frames, height and width.
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
        prefix_from: the block that prefix tokens first enter; blocks below it have patch tokens alone. The number of
            blocks means that they enter after the last one, and attend alone there, in several layers perhaps.
        pictures: brings what the network is given to the form (B, C, H, W), or (B, C, T, H, W) for videos, over which
            the grid lies; `None` if it is given images (B, C, H, W).
    """

    grid: Callable[..., tuple[int, ...]]
    prefix_tokens: int
    blocks: Sequence[nn.Module] = ()
    head: Callable[[Tensor], Any] | None = None
    suffix_tokens: int = 0
    transport: Callable[[int, int], Sequence[Step]] | None = None
    fused: Mapping[nn.Module, Callable[..., Any]] = field(default_factory=dict)
    channels_first: bool = False
    prefix_from: int = 0
    pictures: Callable[[Tensor], Tensor] | None = None

    def pictures_of(self, images: Tensor) -> Tensor:
        """Return what the network is given in the form (B, C, H, W), or (B, C, T, H, W).

        Raises:
            ValueError: for a tensor of another number of dimensions.
        """
        pictures = images if self.pictures is None else self.pictures(images)
        if pictures.dim() not in ((4,) if self.pictures is None else (4, 5)):
            given = f"{tuple(images.shape)}: for videos or sounds, describe `pictures` in gmarpp.Architecture"
            raise ValueError(f"images: expected shape (images, channels, height, width), got {given}")
        return pictures

    def patches(self, tokens: int, block: int = 0) -> slice:
        """Return where the patch tokens are among all of a number of tokens of a block."""
        return slice(self.prefix_at(block), tokens - self.suffix_tokens)

    def prefix_at(self, block: int) -> int:
        """Return how many prefix tokens enter a block."""
        return self.prefix_tokens if block >= self.prefix_from else 0


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


def resolve_architecture(
    given: Architecture | Callable[[nn.Module], Architecture] | str | None, model: nn.Module
) -> Architecture | None:
    """Return the architecture that an option means for a network; `None` where it is left to be found.

    Args:
        given: an architecture; a function from the network to one; the path of such a function, as
            `my_code.describe`; or the dotted name of the network of a known family inside the network.
        model: the network.

    Raises:
        ValueError: nothing has such a name, or what it names returns no architecture.
        UnsupportedNetworkError: the network of that name is of no known family.
    """
    if given is None or isinstance(given, Architecture):
        return given
    if isinstance(given, str):
        if given in (inside := dict(model.named_modules())):
            return architecture_of(inside[given])
        given = _imported(given, model)
    described = given(model)
    if not isinstance(described, Architecture):
        raise ValueError(
            f"architecture: expected a function from {type(model).__name__} to gmarpp.Architecture, got one to "
            f"{type(described).__name__}"
        )
    return described


def _imported(path: str, model: nn.Module) -> Callable[[nn.Module], Any]:
    module, _, name = path.rpartition(".")
    try:
        function: Callable[[nn.Module], Any] = getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"unknown architecture {path!r}: expected the name of a module inside {type(model).__name__}, or the path "
            f"of a function from it to gmarpp.Architecture, such as my_code.describe ({error})"
        ) from error
    return function


def _unknown(model: nn.Module) -> UnsupportedNetworkError:
    if (named := refusal(model)) is not None:
        return named
    kinds = {type(module).__name__.lower() for module in model.modules()}
    if not any(word in kind for kind in kinds for word in ("attention", "attn", "transformer")):
        return UnsupportedNetworkError(
            f"{type(model).__name__} is not known to attend between places of the image: these methods explain Vision "
            "Transformers. One whose modules have other names is described by architecture=gmarpp.Architecture(...)"
        )
    return UnsupportedNetworkError(
        f"the patch grid of {type(model).__name__} is not known. If it is a ViT with global attention, pass "
        "architecture=gmarpp.Architecture(grid=..., prefix_tokens=..., blocks=...). Other networks with "
        "windowed or pyramid attention cannot be explained by these methods: use a ViT, Swin or MaxViT"
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
    if model in met or type(model).__name__ in REFUSED:
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
        grid=(lambda *size: _pair(by_size(size))) if by_size else _by_patch(embedding.patch_size),
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
        grid=_by_patch(model.patch_embed.patch_size),
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
        grid=_by_patch(side),
        prefix_tokens=1 if class_blocks else 0,
        blocks=[*blocks, *class_blocks],
        prefix_from=len(blocks) if class_blocks else 0,
    )


def _timm_attention_pool(model: Any) -> Architecture:
    # The pool of a convolutional network, whose tokens are their mean and the places of the last grid.
    return Architecture(grid=_by_patch(model.feature_info[-1]["reduction"]), prefix_tokens=1)


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


def _hugging_face(
    model: Any,
    grid: Callable[..., tuple[int, ...]] | None = None,
    pictures: Callable[[Tensor], Tensor] | None = None,
) -> Architecture:
    def count(names: Sequence[str]) -> int:
        tokens = [getattr(model.embeddings, name, None) for name in names]
        return sum(1 if each.dim() == 1 else each.shape[-2] for each in tokens if isinstance(each, Tensor))

    return Architecture(
        grid=grid or _by_patch(model.config.patch_size),
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


def _in_stages(describe: Callable[[Any], stages.Stages]) -> Callable[[Any], Architecture]:
    return lambda model: Architecture(**vars(describe(model)))


_IN_STAGES = (
    *(*stages.FAMILIES, *reduced.FAMILIES, *pooled.FAMILIES, *levit.FAMILIES),
    *(*hiera.FAMILIES, *sam.FAMILIES, *mvit.FAMILIES),
)
_FAMILIES: tuple[tuple[Callable[[nn.Module], bool], Callable[[Any], Architecture]], ...] = (
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
    *((matches, _in_stages(describe)) for matches, describe in _IN_STAGES),
)
