"""Methods and a metric as a user would write them in a file of their own, and a package that announces its own."""

import textwrap

MODULE = """
import torch

import gmarpp
from gmarpp.metrics import MeanOverImages, register_metric


class Center(gmarpp.MapMethod):
    name, label, color = "center", "Center first", "#123456"

    def __init__(self, width: float = 1.0):
        self.width = width

    def maps(self, model, images, target):
        rows, columns = torch.meshgrid(torch.linspace(-1, 1, 2), torch.linspace(-1, 1, 2), indexing="ij")
        return (-(rows**2 + (columns - 0.5) ** 2) / self.width).expand(len(images), 2, 2)


def saliency(model, images, target):
    score = model(images).gather(1, target[:, None]).sum()
    return torch.autograd.grad(score, images)[0].abs()
"""

PACKAGE = """
import torch

import gmarpp
from gmarpp.metrics import MeanOverImages, register_metric


def brightness(model, images, target):
    return images.mean(dim=1)


def peak(maps, reduction="mean"):
    values = maps.flatten(1).amax(dim=1)
    return values.mean() if reduction == "mean" else values


class Peak(MeanOverImages):
    higher_is_better = False

    def update(self, maps):
        self.accumulate(peak(maps, reduction="none"))


gmarpp.register_method(gmarpp.FunctionMethod("brightness", brightness, "Brightness of pixels", signed=True))
register_metric("peak", Peak, peak, label="Peak value")
"""


def install(folder, module, text, entry_points):
    """Put a module into a folder, with the metadata that an installed package has."""
    metadata = folder / f"{module}-1.0.dist-info"
    metadata.mkdir(parents=True)
    (folder / f"{module}.py").write_text(text)
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(textwrap.dedent(entry_points))
    return folder


def install_package(folder, module):
    """Install a package that announces the method `brightness` and the metric `peak`."""
    announced = f"[gmarpp.methods]\nbrightness = {module}\n\n[gmarpp.metrics]\npeak = {module}\n"
    return install(folder, module, PACKAGE, announced)
