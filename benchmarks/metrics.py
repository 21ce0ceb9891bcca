"""Speed of the faithfulness metrics, and the share of time that is not the network's forward pass.

    python benchmarks/metrics.py --root data [--ckpt_path checkpoints/X] [--images 16] [--steps 28]
    python benchmarks/metrics.py --root data --device cuda --images 64 --share --profile

Prints, on validation images of Tiny-ImageNet: images per second of Average Drop, Increase and Gain, Insertion and
Deletion for all methods, the share of that time outside the forward pass, the time of `drop` over that of `blur`, and
the time of scoring perturbed images one at a time in float32, as the code first published for GMAR++ did, over that of
the same metrics in batches. All in one run.

`--share` measures another thing alone: the time in which the network, in bfloat16 on a GPU, would score as many images
in passes of the best size, which is looked for among powers of two, over the time that the five metrics take. Nothing
waits for the device between one pass and the next.
"""

import argparse
import json
import math
import time

import torch
from measure import (
    PRECISIONS,
    Profile,
    add_device,
    add_profile,
    autocast,
    gpu_memory,
    machine,
    profiled,
    seconds,
    synchronize,
)
from torch import Tensor, nn
from torch.utils.data import default_collate

import gmarpp
from gmarpp.data import Preprocessing, TinyImageNet
from gmarpp.perturbation import baseline_images, rank_patches, score_perturbations, step_counts


class ForwardClock:
    """Adds up the seconds that a network spends in its forward pass."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self.seconds = 0.0
        self.images = 0
        self.device = device
        model.register_forward_pre_hook(self._start)
        model.register_forward_hook(self._stop)

    def _start(self, _: nn.Module, args: tuple[Tensor]) -> None:
        self.images += len(args[0])
        synchronize(self.device)
        self.seconds -= time.perf_counter()

    def _stop(self, *_: object) -> None:
        synchronize(self.device)
        self.seconds += time.perf_counter()


@torch.no_grad()
def one_at_a_time(model: nn.Module, images: Tensor, maps: Tensor, target: Tensor, steps: int) -> None:
    """Score what the five metrics need as the first published code did: single images, nothing shared."""
    side = images.shape[-1] // maps.shape[-1]
    for image, map_, label in zip(images.split(1), maps, target.tolist(), strict=True):
        blurred, ranks = baseline_images(model, image, "blur"), rank_patches(map_[None])[0]
        patches = ranks.numel()
        counts = step_counts(patches, steps)
        kept = [ranks < count for count in counts] + [ranks >= count for count in counts]
        # Average Drop, Increase and Gain each score the image and its kept region.
        kept += [ranks < patches, ranks < math.ceil(patches / 4)] * 3
        for each in kept:
            mask = each.view(map_.shape).repeat_interleave(side, 0).repeat_interleave(side, 1)
            model(torch.where(mask, image, blurred)).softmax(1)[0, label].item()


def best_pass(model: nn.Module, image: Tensor, precision: str, seconds_per_size: float = 0.5) -> dict[int, float]:
    """Return the network's images per second by the size of a pass, doubled until memory ends or the rate falls."""
    rates: dict[int, float] = {}
    size, device = 16, image.device
    with autocast(precision, device), torch.no_grad():
        while size <= 8192:
            try:
                batch = image.expand(size, *image.shape[1:]).contiguous()
                once = min(seconds(lambda batch=batch: model(batch), device) for _ in range(3))
                passes = max(1, round(seconds_per_size / once))
                elapsed = seconds(lambda batch=batch, passes=passes: [model(batch) for _ in range(passes)], device)
            except torch.OutOfMemoryError:
                break
            rates[size] = passes * size / elapsed
            if rates[size] < 0.9 * max(rates.values()):
                break
            size *= 2
    return rates


def share_of_forward(
    model: nn.Module, images: Tensor, maps: dict[str, Tensor], target: Tensor, options: argparse.Namespace
) -> dict[str, object]:
    """Return the share of the metrics' time that the same number of images takes in passes of the best size."""
    device, scored = images.device, 0
    precision = options.precision or ("bfloat16" if device.type == "cuda" else "float32")
    rates = best_pass(model, images[:1], precision)

    def count(_: nn.Module, given: tuple[Tensor, ...]) -> None:
        nonlocal scored
        scored += len(given[0])

    handle = model.register_forward_pre_hook(count)

    def score() -> None:
        with autocast(precision, device):
            score_perturbations(model, images, maps, target, steps=options.steps, **batch_size)

    batch_size = {} if options.batch is None else {"batch_size": options.batch}
    seconds(score, device)
    scored = 0
    times = [seconds(score, device) for _ in range(options.rounds)]
    handle.remove()
    elapsed, passed = min(times), scored / options.rounds
    best = max(rates, key=lambda size: rates[size])
    report: dict[str, object] = {
        "precision": precision,
        "methods": len(maps),
        "images per second by size of a pass": {size: round(rate, 1) for size, rate in rates.items()},
        "best size": best,
        "images scored per explained image": passed / len(images),
        "images explained and scored per second": round(len(images) / elapsed, 2),
        "rate of scoring, forward passes per second": round(passed / elapsed, 1),
        "share of time in forward passes at the best size": round(passed / rates[best] / elapsed, 4),
    }

    def profile(around: Profile) -> None:
        with around:
            score()

    return report | ({"profile": profiled(profile, device)} if options.profile else {})


def once_and_batched(
    model: nn.Module, images: Tensor, maps: dict[str, Tensor], target: Tensor, options: argparse.Namespace
) -> dict[str, object]:
    """Return the time of scoring images one at a time in float32 over that in batches, by method and precision."""
    few, device = options.single, images.device
    per_method: dict[str, object] = {}
    for method, of_method in maps.items():
        map_ = of_method[:few]
        single = seconds(
            lambda map_=map_: one_at_a_time(model, images[:few], map_, target[:few], options.steps), device
        )
        ratios = {}
        for precision in PRECISIONS:
            with autocast(precision, device):
                batched = seconds(
                    lambda map_=map_: score_perturbations(
                        model, images[:few], {"m": map_}, target[:few], steps=options.steps
                    ),
                    device,
                )
            ratios[precision] = round(single / batched, 2)
        per_method[method] = ratios
    return per_method


def main() -> None:
    """Measure and print JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", required=True, help="folder of Tiny-ImageNet")
    parser.add_argument("--ckpt_path", default="checkpoints/vit_small_patch14_112.tiny_imagenet.safetensors")
    parser.add_argument("--methods", nargs="+", default=list(gmarpp.METHODS))
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--single", type=int, default=4, help="images scored one at a time")
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--share", action="store_true", help="only the share of time in forward passes")
    parser.add_argument("--batch", type=int, help="with --share, perturbed images per pass in place of the default")
    parser.add_argument("--rounds", type=int, default=3, help="with --share, the fastest of so many")
    parser.add_argument("--precision", choices=PRECISIONS, help="with --share; bfloat16 on a GPU, else float32")
    add_device(parser)
    add_profile(parser)
    options = parser.parse_args()

    device: torch.device = options.device
    model = gmarpp.load_model(options.ckpt_path).to(device)
    data = TinyImageNet(root=options.root, preprocessing=Preprocessing.of(model), num_workers=0)
    data.setup("predict")
    images = default_collate([data.datasets["predict"][index]["image"] for index in range(options.images)])
    images = images.to(device)
    explanation = gmarpp.explain(model, images, options.methods)
    maps, target = explanation.maps, explanation.target
    report: dict[str, object] = machine(device) | vars(options) | {"device": str(device)}
    if options.share:
        report |= share_of_forward(model, images, maps, target, options) | gpu_memory(device)
        print(json.dumps(report, indent=2))
        return
    clock = ForwardClock(model, device)
    for precision in PRECISIONS:
        with autocast(precision, device):
            clock.seconds, clock.images = 0.0, 0
            blur = seconds(lambda: score_perturbations(model, images, maps, target, steps=options.steps), device)
            forward, scored = clock.seconds, clock.images
            drop = seconds(
                lambda: score_perturbations(model, images, maps, target, steps=options.steps, baseline="drop"),
                device,
            )
        report[precision] = {
            f"images per second, {len(maps)} methods": round(options.images / blur, 3),
            "share of time outside the forward pass": round(1 - forward / blur, 4),
            "forward passes per image": scored / options.images,
            "drop / blur": round(drop / blur, 2),
        }
    report["one at a time in float32 / batched, per method"] = once_and_batched(model, images, maps, target, options)
    print(json.dumps(report | gpu_memory(device), indent=2))


if __name__ == "__main__":
    main()
