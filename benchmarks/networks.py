"""Which networks are explained: the table of docs/networks.md, by class, with the weights that it covers.

    python benchmarks/networks.py [--names 'vit_*' 'swin_*'] [--write docs/networks.md]

Every architecture of timm with pretrained weights is built without memory (on the meta device). Those with the same
classes of modules, pool and tokens are alike: the smallest of them is built small, with random weights, and explained
by all methods. So are the transformers of torchvision, and one network of each class of Hugging Face's image
classifiers and towers. Nothing is downloaded.
"""

import argparse
import fnmatch
import re
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
import torchvision
import transformers
from torch import Tensor, nn
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES

import gmarpp
from gmarpp.network.families.refused import REFUSED

METHODS = gmarpp.METHODS + gmarpp.VARIANTS
BEGIN, END = "<!-- made by benchmarks/networks.py -->", "<!-- end -->"
SMALL = {"depth": 2, "embed_dim": 48, "num_heads": 3}
SMALL_CONFIG = {"hidden_size": 48, "num_attention_heads": 3, "intermediate_size": 96, "num_hidden_layers": 2}
# What modules are named after that attend; the last ones weigh branches or channels.
ATTENTION = ("attention", "attn", "mhsa", "gpsa", "shsa", "shma", "litemla", "parallelscaling")
OF_CHANNELS = ("cbammodule", "splitattn", "selectivekernelattn")
TOWERS = (
    *("CLIPVisionModel", "SiglipVisionModel", "Siglip2VisionModel", "MetaClip2VisionModel", "AltCLIPVisionModel"),
    *("ChineseCLIPVisionModel", "BlipVisionModel", "Blip2VisionModel", "GitVisionModel", "Aimv2VisionModel"),
    *("MLCDVisionModel", "Dinov2Model", "DINOv3ViTModel", "ViTMAEModel", "VitDetModel", "SamVisionModel", "DPTModel"),
)


class Row(NamedTuple):
    """A line of the table: what becomes of the networks of a class.

    Attributes:
        name: of the class.
        library: where it is from.
        outcome: which methods explain it, or why none does.
        tried: the network that stands for the others.
        weights: how many pretrained weights the library has of it; `None` if it does not say.
    """

    name: str
    library: str
    outcome: str
    tried: str
    weights: int | None


def outcome(model: nn.Module, images: Tensor) -> str:
    """Return which methods explain a network, or why it is refused."""
    if refusal(model, images, METHODS) is None:
        return "explained"
    refused = {method: refusal(model, images, (method,)) for method in METHODS}
    missing = [method for method, message in refused.items() if message is not None]
    if "gmarpp_l1" not in missing:
        return f"explained, but not by {', '.join(missing)}"
    return f"refused: {refused['gmarpp_l1']}"


def refusal(model: nn.Module, images: Tensor, methods: Sequence[str]) -> str | None:
    """Return why methods refuse a network, shortly, if they do."""
    try:
        gmarpp.explain(model, images, methods, score)
    except gmarpp.UnsupportedNetworkError as error:
        held = next((name for name in map(kind_of, model.modules()) if name in REFUSED), None)
        return str(error).partition(":")[0] if held is None else REFUSED[held]
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:90]}"
    return None


def kind_of(module: nn.Module) -> str:
    """Return the name of a module's class."""
    return type(module).__name__


def score(output: Any) -> Tensor:
    """Score an output of any shape by a direction."""
    tensors = [getattr(output, name, None) for name in ("logits", "pooler_output", "last_hidden_state")]
    values: Tensor = next((each for each in tensors if isinstance(each, Tensor)), output).flatten(1)
    return values @ torch.linspace(-1, 1, values.shape[1])


def attends(model: nn.Module) -> bool:
    """Return whether any module is named after attention between places."""
    kinds = {kind_of(module).lower() for module in model.modules()}
    return any(word in kind for kind in kinds for word in ATTENTION if kind not in OF_CHANNELS)


def build_timm(name: str) -> tuple[nn.Module, Tensor]:
    """Build a network with as many of the small sizes as it takes, and random images for it."""
    size = timm.get_pretrained_cfg(name).input_size[-1]
    for options in (SMALL, {"depth": 2}, {}):
        if name.startswith("convit"):
            # Its class token enters above the first block.
            options = {**options, "local_up_to_layer": 1}
        if name.startswith("visformer") and "depth" in options:
            # Two blocks would be those of one of its stages.
            options = {**options, "depth": (1, 1, 1)}
        try:
            model = timm.create_model(name, **options)
        except (TypeError, AssertionError, ValueError, RuntimeError, IndexError):
            continue
        for parameter in model.parameters() if "depth" in options else ():
            # Attention that is far from uniform, as trained networks have it.
            parameter.data.mul_(5 if parameter.dim() == 2 else 1)
        for parameter in model.parameters():
            # A head that begins with zeros, as Hiera's does, gives no score a gradient.
            if parameter.dim() == 2 and not parameter.any():
                nn.init.normal_(parameter, std=0.02)
        return model.eval(), torch.randn(1, 3, size, size)
    raise RuntimeError(f"{name} cannot be built")


def groups(patterns: list[str]) -> dict[tuple[Any, ...], dict[str, tuple[int, int]]]:
    """Return parameters and numbers of pretrained weights by name, of timm's networks that attend, by signature."""
    weights = Counter(name.partition(".")[0] for name in timm.list_pretrained())
    found: dict[tuple[Any, ...], dict[str, tuple[int, int]]] = defaultdict(dict)
    for name, count in sorted(weights.items()):
        if not any(fnmatch.fnmatch(name, pattern) for pattern in patterns):
            continue
        with torch.device("meta"):
            model: Any = timm.create_model(name)
        if attends(model):
            pool, prefix = getattr(model, "global_pool", None), getattr(model, "num_prefix_tokens", None)
            signature = kind_of(model), frozenset(map(kind_of, model.modules())), str(pool), prefix
            found[signature][name] = (sum(each.numel() for each in model.parameters()), count)
    return found


def of_timm(patterns: list[str]) -> Iterator[Row]:
    """Try the networks of timm."""
    for (kind, *_), names in groups(patterns).items():
        smallest = min(names, key=lambda name: names[name])
        torch.manual_seed(0)
        yield Row(kind, "timm", outcome(*build_timm(smallest)), smallest, sum(count for _, count in names.values()))


def of_torchvision(patterns: list[str]) -> Iterator[Row]:
    """Try the transformers of torchvision."""
    for kind, including in {
        "VisionTransformer": "vit*",
        "SwinTransformer": "swin_?",
        "SwinTransformer, version 2": "swin_v2*",
        "MaxVit": "maxvit*",
    }.items():
        names = torchvision.models.list_models(module=torchvision.models, include=including)
        names = [name for name in names if any(fnmatch.fnmatch(name, pattern) for pattern in patterns)]
        if names:
            model, images = build_torchvision(names[0])
            weights = sum(len(torchvision.models.get_model_weights(name)) for name in names)
            yield Row(kind, "torchvision", outcome(model, images), names[0], weights)


def build_torchvision(name: str) -> tuple[nn.Module, Tensor]:
    """Build a network of torchvision, and random images for it."""
    torch.manual_seed(0)
    model = torchvision.models.get_model(name).eval()
    for module in model.modules():
        # The head of its ViT starts as zeros.
        if isinstance(module, nn.Linear) and not module.weight.any():
            nn.init.normal_(module.weight)
    size = 256 if "_v2" in name else 224
    return model, torch.randn(1, 3, size, size)


class Patches(nn.Module):
    """Gives SigLIP 2 what it takes: the patches of images, a mask, and how many rows and columns of them there are."""

    def __init__(self, model: nn.Module, side: int) -> None:
        super().__init__()
        self.model, self.side = model, side

    def forward(self, images: Tensor) -> Any:
        """Return what the model makes of the patches of images, (B, 3, H, W)."""
        cells = images.unfold(2, self.side, self.side).unfold(3, self.side, self.side)
        patches, shape = cells.permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(1, 2), torch.tensor([cells.shape[2:4]])
        mask = torch.ones(patches.shape[:2], dtype=torch.long)
        return self.model(patches, mask, shape.expand(len(images), 2))


class Asked(nn.Module):
    """Gives ShieldGemma 2 a text beside the image: the places of the image's tokens, and one word."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Any:
        """Return what the model makes of images, (B, 3, H, W)."""
        config = self.model.config
        words = [config.image_token_index] * config.mm_tokens_per_image + [1]
        return self.model(input_ids=torch.tensor([words] * len(images)), pixel_values=images)


def build_transformers(name: str) -> tuple[nn.Module, Tensor]:
    """Build a network of transformers with as many of the small sizes as it takes, and random images for it."""
    kind: Any = getattr(transformers, name)
    config = kind.config_class()
    if name.startswith("ShieldGemma2"):
        text = {"num_key_value_heads": 1, "head_dim": 16, "vocab_size": 512, "layer_types": None}
        numbers = {"image_token_index": 511, "yes_token_index": 2, "no_token_index": 3, "mm_tokens_per_image": 49}
        config = type(config)(text_config=SMALL_CONFIG | text, **numbers)
    if name.startswith("Perceiver"):
        config.num_cross_attention_heads = 1
    for part in (config, getattr(config, "vision_config", None)):
        # Pyramids have lists of sizes, which fit each other.
        if part is not None and not hasattr(part, "depths") and not isinstance(getattr(part, "hidden_size", 0), list):
            for option, value in SMALL_CONFIG.items():
                setattr(part, option, value) if hasattr(part, option) else None
    size = getattr(config, "image_size", None) or getattr(getattr(config, "vision_config", None), "image_size", 224)
    height, width = (size, size) if isinstance(size, int) else size
    model = kind(config).eval()
    if name.startswith("Siglip2"):
        model = Patches(model, getattr(config, "vision_config", config).patch_size).eval()
    if name.startswith("ShieldGemma2"):
        model = Asked(model).eval()
    return model, torch.randn(1, 3, height, width)


def of_transformers(patterns: list[str]) -> Iterator[Row]:
    """Try the image classifiers and towers of transformers."""
    named = MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES.values()
    classes = [each for names in named for each in ((names,) if isinstance(names, str) else names)]
    for name in (*classes, *TOWERS):
        if not any(fnmatch.fnmatch(name, pattern) for pattern in patterns):
            continue
        torch.manual_seed(0)
        try:
            model, images = build_transformers(name)
        except Exception as error:
            yield Row(name, "transformers", f"not tried: {str(error).strip().splitlines()[0]}", name, None)
            continue
        if attends(model):
            yield Row(name, "transformers", outcome(model, images), name, None)


def table(rows: Sequence[Row]) -> str:
    """Return the table in Markdown, and how many weights it covers; rows of one class and outcome are one."""
    merged: dict[tuple[str, str, str], Row] = {}
    for row in rows:
        same = merged.get(row[:3])
        weights = row.weights if same is None or same.weights is None else same.weights + (row.weights or 0)
        merged[row[:3]] = row._replace(tried=row.tried if same is None else same.tried, weights=weights)
    ordered = sorted(
        merged.values(), key=lambda row: (row.library != "timm", row.library, -(row.weights or 0), row.name)
    )
    lines = ["| class | from | weights | outcome | tried with |", "|---|---|---|---|---|"]
    for row in ordered:
        listed = "" if row.weights is None else str(row.weights)
        lines.append(f"| `{row.name}` | {row.library} | {listed} | {cell(row.outcome)} | `{row.tried}` |")
    for library in dict.fromkeys(row.library for row in ordered):
        of_library = [row for row in ordered if row.library == library]
        what = "weights of networks that attend" if library != "transformers" else "classes"
        explained = sum(row.weights or 1 for row in of_library if row.outcome.startswith("explained"))
        lines += ["", f"{library}: {explained} of {sum(row.weights or 1 for row in of_library)} {what} are explained."]
    return "\n".join(lines) + "\n"


def cell(text: str) -> str:
    """Return text that fits into a cell of a table."""
    return re.sub(r"\s+", " ", text).replace("|", "/")


def write(path: Path, made: str) -> None:
    """Put a table in the place of the one that a page has.

    Raises:
        ValueError: if the page has no place for it.
    """
    page = path.read_text()
    if BEGIN not in page or END not in page:
        raise ValueError(f"{path}: expected lines {BEGIN!r} and {END!r} around the table, got none")
    before, after = page[: page.index(BEGIN) + len(BEGIN)], page[page.index(END) :]
    path.write_text(f"{before}\n\n{made}\n{after}")


def main() -> None:
    """Print the table, and write it into a page if one is named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--names", nargs="+", default=["*"], help="patterns of architectures, or of transformers' classes"
    )
    parser.add_argument("--write", type=Path, help="page whose table is replaced")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    rows = [*of_timm(options.names), *of_torchvision(options.names), *of_transformers(options.names)]
    made = table(rows)
    print(made)
    if options.write:
        write(options.write, made)


if __name__ == "__main__":
    main()
