"""Networks that are not explained, by class: what there is in place of attention between places that can be followed.

A class of any library that is named here ends in its own message, wherever it is in a network.
"""

from torch import nn

from gmarpp.network.errors import UnsupportedNetworkError

_REASONS: dict[str, tuple[str, ...]] = {
    "attends between channels, so that no matrix says which place attends to which": ("EdgeNeXt",),
    "attends by sums over all places (linear attention), so that there is no matrix of places": (
        "CoaT",
        "EfficientVit",
        "EfficientVitLarge",
        "SwiftFormer",
        "SwiftFormerModel",
        "MobileViTV2Model",
        "MobileVitV2Block",
    ),
    "mixes places by sequences of states, and not by attention": ("EfficientViM", "Sequencer2d", "MambaOut"),
    "attends one head after the other, each to what the one before it has found": ("EfficientVitMsra",),
    "attends in two branches of different patches, which exchange their class tokens": ("CrossVit",),
    "mixes the heads of its attention in several stages, with fewer queries than keys between them": (
        "EfficientFormerV2",
    ),
    "attends with a part of its channels, between convolutions over places": ("CSATv2",),
    "attends from blocks of places to wider ones, which overlap (HaloNet), or applies functions that are sums over all "
    "places (LambdaNetworks)": ("SelfAttnBlock",),
    "mixes places by one matrix of rows and one of columns, which are no shares of places": ("BatNonLocalAttn",),
    "makes one grid of the tokens of two stages, above the last block that attends": ("MobileNetV5",),
    "answers by the next word of a text, whose words attend to each other and to the image": (
        "ShieldGemma2ForImageClassification",
    ),
    "makes queries, keys and values of neighboring places by convolutions, with fewer keys from stage to stage": (
        "CvtModel",
    ),
    "lets its class token in at the last of its stages, where tokens are merged already": ("PvtModel",),
    "attends inside patches too, and hands two streams of tokens from block to block": ("TNT",),
    "attends to places that lie apart, one group after the other": ("MobileViTModel", "MobileVitBlock"),
    "asks queries of its own about the pixels, so that its tokens are no places": ("PerceiverModel",),
    "predicts one pixel after the other, of a palette of colors, so that no image can be differentiated": (
        "ImageGPTModel",
    ),
    "attends over time and over space by turns, in videos": ("TimesformerModel",),
    "has no attention: it pools the neighbors of each place": ("PoolFormerModel",),
    "has no attention: it modulates each place by averages around it": ("FocalNet", "FocalNetModel"),
}
REFUSED = {name: reason for reason, names in _REASONS.items() for name in names}
"""Why a network is not explained, by the name of its class, as the end of a sentence about it."""

_REMEDY = (
    "Explain a Vision Transformer or one of the networks of docs/networks.md, or bring a method that needs no "
    "attention as a gmarpp.attribution.MapMethod"
)


def refusal(model: nn.Module) -> UnsupportedNetworkError | None:
    """Return the error of a network that is, or holds, one of the classes that are not explained; `None` otherwise."""
    names = (type(module).__name__ for module in model.modules())
    name = next((name for name in names if name in REFUSED), None)
    return None if name is None else UnsupportedNetworkError(f"{name} {REFUSED[name]}. {_REMEDY}")
