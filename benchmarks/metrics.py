"""Speed of the faithfulness metrics, and the share of time that is not the network's forward pass.

    python benchmarks/metrics.py --root data [--ckpt_path checkpoints/X] [--images 16] [--steps 28]

Prints, on validation images of Tiny-ImageNet: images per second of Average Drop, Increase and Gain, Insertion and
Deletion for all methods, the share of that time outside the forward pass, the time of `drop` over that of `blur`, and
the time of scoring perturbed images one at a time in float32, as the code first published for GMAR++ did, over that of
the same metrics in batches. All in one run.
"""

import argparse
import json
import math
import time

import torch
from measure import PRECISIONS, add_device, autocast, gpu_memory, machine, seconds, synchronize
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


def main() -> None:
    """Measure and print JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", required=True, help="folder of Tiny-ImageNet")
    parser.add_argument("--ckpt_path", default="checkpoints/vit_small_patch14_112.tiny_imagenet.safetensors")
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--single", type=int, default=4, help="images scored one at a time")
    parser.add_argument("--steps", type=int, default=28)
    add_device(parser)
    options = parser.parse_args()

    device: torch.device = options.device
    model = gmarpp.load_model(options.ckpt_path).to(device)
    data = TinyImageNet(root=options.root, preprocessing=Preprocessing.of(model), num_workers=0)
    data.setup("predict")
    images = default_collate([data.datasets["predict"][index]["image"] for index in range(options.images)])
    images = images.to(device)
    explanation = gmarpp.explain(model, images, gmarpp.METHODS)
    maps, target = explanation.maps, explanation.target
    clock = ForwardClock(model, device)
    report: dict[str, object] = machine(device) | vars(options) | {"device": str(device)}
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
            "images per second, 9 methods": round(options.images / blur, 3),
            "share of time outside the forward pass": round(1 - forward / blur, 4),
            "forward passes per image": scored / options.images,
            "drop / blur": round(drop / blur, 2),
        }
    few = images[: options.single], target[: options.single]
    per_method: dict[str, dict[str, float]] = {}
    for method in gmarpp.METHODS:
        map_ = maps[method][: options.single]
        single = seconds(lambda map_=map_: one_at_a_time(model, few[0], map_, few[1], options.steps), device)
        per_method[method] = {}
        for precision in PRECISIONS:
            with autocast(precision, device):
                batched = seconds(
                    lambda map_=map_: score_perturbations(model, few[0], {"m": map_}, few[1], steps=options.steps),
                    device,
                )
            per_method[method][precision] = round(single / batched, 2)
    report["one at a time in float32 / batched, per method"] = per_method
    print(json.dumps(report | gpu_memory(device), indent=2))


if __name__ == "__main__":
    main()
