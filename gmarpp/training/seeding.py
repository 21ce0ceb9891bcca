"""Random numbers that depend on a step's place in a run alone, so that a resumed run draws those of a whole one."""

import random

import numpy as np
import torch


def seed_step(place: tuple[int, ...], device: torch.device) -> None:
    """Seed the generators that dropout, stochastic depth and mixup draw from.

    Args:
        place: what makes a step differ from all others, such as seed, rank, epoch and batch.
        device: whose generator is seeded beside those of the CPU.
    """
    seed = hash(place) & 0xFFFFFFFF
    random.seed(seed)
    np.random.seed(seed)
    # The generators' own method: torch.manual_seed formats the whole stack where an accelerator is not in use.
    torch.default_generator.manual_seed(seed)
    if device.type != "cpu":
        torch.get_device_module(device).manual_seed(seed)
