"""Which of timm's pretrained networks are explained: a table by class, and how many weights it covers.

    python benchmarks/networks.py [--names 'vit_*' 'swin_*']

Every architecture with pretrained weights is built without memory (on the meta device). Those with the same classes of
modules, pool and tokens are alike: the smallest of them is built small, with random weights, and explained by all
methods. Nothing is downloaded.
"""

import argparse
import fnmatch
import warnings
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

import timm
import torch
from torch import Tensor, nn

import gmarpp

# What can be said of attention that the network subtracts.
BY_SIGN = ("gmarpp_l1", "gmarpp_l2", "chefer", "legrad")
SMALL = {"depth": 2, "embed_dim": 48, "num_heads": 3}


def attends(model: nn.Module) -> bool:
    """Return whether any module is named after attention, that of channels (squeeze and excitation) aside."""
    words = ("attention", "attn", "mhsa", "gpsa", "parallelscaling")
    return any(word in kind for kind in kinds(model) for word in words) and "cbammodule" not in kinds(model)


def kinds(model: nn.Module) -> set[str]:
    """Return the classes of a network's modules."""
    return {type(module).__name__.lower() for module in model.modules()}


def signature(model: Any) -> tuple[Any, ...]:
    """Return what networks have in common that are explained alike."""
    pool, prefix = getattr(model, "global_pool", None), getattr(model, "num_prefix_tokens", None)
    return type(model).__name__, frozenset(kinds(model)), str(pool), prefix


def build_small(name: str) -> tuple[nn.Module, Tensor]:
    """Build a network with as many of the small sizes as it takes, and random images for it."""
    size = timm.get_pretrained_cfg(name).input_size[-1]
    for options in (SMALL, {"depth": 2}, {}):
        try:
            model = timm.create_model(name, **options)
        except (TypeError, AssertionError, ValueError, RuntimeError, IndexError):
            continue
        return model.eval(), torch.randn(1, 3, size, size)
    raise RuntimeError(f"{name} cannot be built")


def outcome(name: str) -> str:
    """Return which methods explain a network, or the beginning of the message that refuses it."""
    torch.manual_seed(0)
    model, images = build_small(name)
    refused = refusal(model, images, gmarpp.METHODS)
    if refused is None:
        return "explained"
    return f"explained by {', '.join(BY_SIGN)}" if refusal(model, images, BY_SIGN) is None else refused


def refusal(model: nn.Module, images: Tensor, methods: Sequence[str]) -> str | None:
    """Return the beginning of the message with which methods refuse a network, if they do."""
    try:
        gmarpp.explain(model, images, methods, score)
    except gmarpp.UnsupportedNetworkError as error:
        return f"refused: {str(error)[:90]}"
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:90]}"
    return None


def score(output: Any) -> Tensor:
    """Score an output of any shape by a direction."""
    values: Tensor = output.flatten(1)
    return values @ torch.linspace(-1, 1, values.shape[1])


def groups(patterns: list[str]) -> dict[tuple[Any, ...], dict[str, tuple[int, int]]]:
    """Return parameters and numbers of pretrained weights by name, of the networks that attend, by signature."""
    weights = Counter(name.partition(".")[0] for name in timm.list_pretrained())
    found: dict[tuple[Any, ...], dict[str, tuple[int, int]]] = defaultdict(dict)
    for name, count in sorted(weights.items()):
        if not any(fnmatch.fnmatch(name, pattern) for pattern in patterns):
            continue
        with torch.device("meta"):
            model = timm.create_model(name)
        if attends(model):
            parameters = sum(each.numel() for each in model.parameters())
            found[signature(model)][name] = (parameters, count)
    return found


def main() -> None:
    """Print a line for each class and outcome, and the weights that are covered."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--names", nargs="+", default=["*"], help="patterns of architectures")
    warnings.simplefilter("ignore")
    table: Counter[tuple[str, str]] = Counter()
    for (kind, *_), names in groups(parser.parse_args().names).items():
        smallest = min(names, key=lambda name: names[name])
        table[kind, outcome(smallest)] += sum(count for _, count in names.values())
    print("| class | weights | outcome |\n|---|---|---|")
    for (kind, result), count in table.most_common():
        print(f"| {kind} | {count} | {result} |")
    explained = sum(count for (_, result), count in table.items() if result.startswith("explained"))
    print(f"\n{explained} of {table.total()} weights of networks that attend are explained.")


if __name__ == "__main__":
    main()
