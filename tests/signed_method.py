"""A method whose relevance grows down the image, from strongly against the class to for it."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from gmarpp.attribution import Method


@dataclass(frozen=True)
class Downwards(Method):
    name: str = "downwards"
    label: str = "Downwards"
    needs_gradient: ClassVar[bool] = False
    signed: ClassVar[bool] = True

    def start(self, readout, images, tokens):
        return torch.linspace(-3, 1, tokens).expand(len(images), tokens)

    def step(self, row, layer):
        return row
