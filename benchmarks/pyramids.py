"""Time of explaining networks that attend in windows or merge tokens, as multiples of their forward pass.

    python benchmarks/pyramids.py [--device cuda] [--networks swin_base_patch4_window7_224 hiera_base_224] [--batch 4]

All methods that the network supports, in one call; weights are random. Jobs alternate with the forward pass.
"""

import argparse
import json
import statistics
from functools import partial

import timm
import torch
from measure import add_device, alternate, machine, run_job
from torch import Tensor, nn

import gmarpp


def supported(model: nn.Module, images: Tensor) -> tuple[str, ...]:
    """Return the names of the methods that do not refuse the network."""
    found = []
    for name in (*gmarpp.METHODS, *gmarpp.VARIANTS):
        try:
            gmarpp.explain(model, images, name)
        except gmarpp.UnsupportedNetworkError:
            continue
        found.append(name)
    return tuple(found)


@torch.no_grad()
def forward(model: nn.Module, images: Tensor) -> None:
    """Run the network."""
    model(images)


def main() -> None:
    """Print a line for each network."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=["swin_base_patch4_window7_224", "hiera_base_224"])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    add_device(parser)
    options = parser.parse_args()
    print(json.dumps(machine(options.device)), flush=True)
    for name in options.networks:
        torch.manual_seed(0)
        model = timm.create_model(name, num_classes=200).eval().requires_grad_(False).to(options.device)
        # Some heads start at zero, where there is nothing to explain.
        model.get_classifier().reset_parameters()
        images = torch.randn(options.batch, 3, 224, 224, device=options.device)
        methods = supported(model, images[:1])
        plain = tuple(method for method in methods if method in gmarpp.METHODS)
        calls = {f"{len(plain)} methods": plain, f"all {len(methods)}": methods}
        calls |= {each: (each,) for each in ("gmarpp_l1", "rollout", "token_relevance") if each in methods}
        jobs = {"gradient": partial(run_job, "gradient", model, images)}
        jobs |= {label: partial(gmarpp.explain, model, images, each, 0) for label, each in calls.items()}
        timings = alternate(jobs, partial(forward, model, images), options.repeats, device=options.device)
        seconds = statistics.median(run.forward for runs in timings.values() for run in runs)
        ratios = {
            job: round(statistics.median(run.seconds / run.forward for run in runs), 2) for job, runs in timings.items()
        }
        row = {"forward, ms per image": round(1000 * seconds / options.batch, 1), **ratios}
        row["refused"] = sorted({*gmarpp.METHODS, *gmarpp.VARIANTS} - set(methods))
        print(json.dumps({name: row}), flush=True)


if __name__ == "__main__":
    main()
