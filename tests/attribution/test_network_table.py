"""The table of networks in the documentation, and that a family is one entry."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest
import torch
from test_families import images, relative_error, timm_network
from torch import nn

import gmarpp
from gmarpp.network import families
from gmarpp.network.architecture import Architecture
from gmarpp.network.families.encoders import by_patch

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/networks.md"
ROW = re.compile(r"\| `(.+)` \| (\w+) \| (\d*) \| (.+) \| `(.+)` \|")


@pytest.fixture(scope="module")
def networks():
    spec = importlib.util.spec_from_file_location("networks", ROOT / "benchmarks/networks.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def made_rows():
    page = PAGE.read_text()
    made = page[page.index("<!-- made by") : page.index("<!-- end -->")]
    return [match.groups() for match in map(ROW.fullmatch, made.splitlines()) if match]


OF_TIMM = ("Cait", "ConVit", "EdgeNeXt", "EfficientFormer")
OF_TRANSFORMERS = ("ViTForImageClassification", "BlipVisionModel", "Siglip2VisionModel")


@pytest.mark.parametrize("kind", [*OF_TIMM, *OF_TRANSFORMERS])
def test_rows_say_what_becomes_of_the_network(networks, kind):
    (row,) = [row for row in made_rows() if row[0] == kind]
    _, library, _, outcome, tried = row
    torch.manual_seed(0)
    model, batch = {"timm": networks.build_timm, "transformers": networks.build_transformers}[library](tried)
    assert networks.cell(networks.outcome(model, batch)) == outcome


def test_weights_add_up(networks):
    rows = made_rows()
    for library in ("timm", "torchvision"):
        weights = [(int(row[2]), row[3].startswith("explained")) for row in rows if row[1] == library]
        explained = sum(count for count, is_explained in weights if is_explained)
        line = f"{library}: {explained} of {sum(count for count, _ in weights)} weights of networks that attend are"
        assert line in PAGE.read_text()
    assert {row[1] for row in rows} == {"timm", "torchvision", "transformers"}


def test_the_table_is_made_in_its_place(networks, tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{networks.BEGIN}\nold\n{networks.END}\nafter\n")
    rows = [
        networks.Row("Small", "timm", "explained", "small_1", 3),
        networks.Row("Small", "timm", "explained", "small_2", 4),
        networks.Row("Small", "timm", "refused: has | no\nattention", "small_3", 5),
        networks.Row("Model", "transformers", "explained", "Model", None),
    ]
    networks.write(page, networks.table(rows))
    text = page.read_text()
    assert "| `Small` | timm | 7 | explained | `small_1` |" in text
    assert "| `Small` | timm | 5 | refused: has / no attention | `small_3` |" in text
    assert "timm: 7 of 12 weights" in text
    assert "transformers: 1 of 1 classes" in text
    assert text.startswith("before")
    assert text.endswith("after\n")
    assert "old" not in text
    page.write_text("no place")
    with pytest.raises(ValueError, match="around the table, got none"):
        networks.write(page, "")


class Plain(nn.Module):
    """A network of a class that nobody knows."""

    patch_size = 8

    def __init__(self):
        super().__init__()
        vit = timm_network("vit_tiny_patch16_224")
        self.embed, self.position, self.layers, self.norm, self.head = (
            *(vit.patch_embed, vit._pos_embed, nn.ModuleList(vit.blocks), vit.norm, vit.head),
        )

    def forward(self, batch):
        tokens = self.position(self.embed(batch))
        for layer in self.layers:
            tokens = layer(tokens)
        return self.head(self.norm(tokens)[:, 0])


def test_a_family_is_one_entry(monkeypatch):
    def plain(model):
        return Architecture(grid=by_patch(model.patch_size), prefix_tokens=1, blocks=list(model.layers))

    entry = (lambda model: isinstance(model, Plain), plain)
    monkeypatch.setattr(families, "FAMILIES", (*families.FAMILIES, entry))
    methods = gmarpp.METHODS + gmarpp.VARIANTS
    found = gmarpp.explain(Plain(), images(), methods, 2).maps
    expected = gmarpp.explain(timm_network("vit_tiny_patch16_224"), images(), methods, 2).maps
    assert all(relative_error(found[method], expected[method]) < 1e-5 for method in methods)
