import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from gmarpp.attribution import Explanation
from gmarpp.network.preprocessing import Preprocessing


def explanation(images, columns=()):
    generator = torch.Generator().manual_seed(0)
    count = len(images)
    maps = {name: torch.randn(count, *columns, 4, 6, generator=generator) for name in ("rollout", "token_relevance")}
    target = torch.ones(count, *columns, dtype=torch.long)
    return Explanation(
        maps, target, torch.randn(count, 3), target.float(), images, ("a", "b", "c"), ("token_relevance",)
    )


def blob(height, width):
    """A picture that looks different everywhere."""
    x, y = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    values = np.stack([x, y, (x - 0.4) ** 2 + (y - 0.7) ** 2], axis=-1)
    return Image.fromarray((255 * values.clip(0, 1)).astype(np.uint8))


def as_image(picture, size, box=None):
    resized = picture.resize(size, Image.Resampling.BICUBIC, box=box)
    return torch.from_numpy(np.array(resized)).movedim(-1, 0)[None] / 255


def test_raw_maps_are_read_back_exactly(tmp_path):
    found = explanation(torch.rand(2, 3, 16, 24))
    found.save(tmp_path / "new" / "maps.safetensors")
    read = load_file(tmp_path / "new" / "maps.safetensors")
    assert set(read) == {"maps/rollout", "maps/token_relevance", "target", "logits", "scores"}
    assert torch.equal(read["maps/rollout"], found.maps["rollout"])
    assert torch.equal(read["logits"], found.logits)
    with safe_open(tmp_path / "new" / "maps.safetensors", "pt") as file:
        about = json.loads(file.metadata()["explanation"])
    assert about == {"class_names": ["a", "b", "c"], "signed_methods": ["token_relevance"]}


def test_a_folder_holds_maps_and_an_overlay_per_image_method_and_class(tmp_path):
    found = explanation(torch.rand(2, 3, 16, 24), columns=(2,))
    found.save(tmp_path / "run")
    files = {path.relative_to(tmp_path / "run").as_posix() for path in (tmp_path / "run").rglob("*.*")}
    names = [f"{method}/{image:04d}-{k}.png" for method in found.maps for image in (0, 1) for k in (0, 1)]
    assert files == {"maps.safetensors", *(f"overlays/{name}" for name in names)}
    with Image.open(tmp_path / "run" / "overlays" / "rollout" / "0001-1.png") as drawn:
        assert (np.asarray(drawn) == np.asarray(found.overlay(1, "rollout", 1))).all()
    (tmp_path / "run" / "overlays" / "rollout" / "mine.png").touch()
    explanation(torch.rand(1, 3, 16, 24)).save(tmp_path / "run")
    left = {path.name for path in (tmp_path / "run" / "overlays" / "rollout").iterdir()}
    assert left == {"0000.png", "mine.png"}, "nothing is left of the earlier explanation"
    with pytest.raises(ValueError, match=r"unknown suffix '\.gif': choose from \.safetensors, \.png, \.pdf, \.svg"):
        found.save(tmp_path / "a.gif")


def test_a_figure_shows_all_images(tmp_path):
    explanation(torch.rand(9, 3, 16, 24)).save(tmp_path / "figure.svg")
    # Three rows, and the scales of both kinds of maps.
    assert (tmp_path / "figure.svg").read_text().count("<image ") == 9 * 3 + 2


def test_overlays_of_originals_have_their_size_and_keep_what_was_not_seen(tmp_path):
    picture, box = blob(90, 160), (50, 20, 110, 60)
    found = explanation(as_image(picture, (24, 16), box))
    found.maps["rollout"][:] = torch.tensor([0.0, 1, 1, 1, 1, 1])
    found.save(tmp_path / "run", originals=[picture], regions=[box])
    with Image.open(tmp_path / "run" / "overlays" / "rollout" / "0000.png") as drawn:
        values, before = np.asarray(drawn).astype(int), np.asarray(picture)
    assert values.shape == (90, 160, 3)
    changed = (values != before).any(axis=2)
    rows, columns = np.nonzero(changed)
    assert (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1) == box
    # The first of six patches across, which is ten pixels wide here, is dark, the others bright.
    assert values[40, 53].sum() + 150 < values[40, 67].sum()
    with pytest.raises(ValueError, match="originals: expected one for each of 1 images, got 2"):
        found.save(tmp_path / "two", originals=[picture, picture])
    assert not (tmp_path / "two").exists()
    with pytest.raises(ValueError, match="originals are for the overlays of a folder"):
        found.save(tmp_path / "maps.safetensors", originals=[picture])


def test_a_part_that_looks_otherwise_is_refused():
    picture, preprocessing = blob(90, 160), Preprocessing((64, 64), (0.5,) * 3, (0.5,) * 3, crop_pct=0.9)
    region = preprocessing.region(90, 160)
    found = explanation(as_image(picture, (64, 64), region))
    assert found.overlay(0, original=picture, region=region).size == (160, 90)
    with pytest.raises(ValueError, match=r"region: expected the part of the original, 160x90 .* \(0, 0, 160, 90\)"):
        found.overlay(0, original=picture)
    # A gray image, of which nobody can tell, and one that was squashed.
    explanation(torch.full((1, 3, 64, 64), 0.5)).overlay(0, original=picture)
    assert explanation(as_image(picture, (64, 64))).overlay(0, original=picture).size == (160, 90)


def test_the_scores_of_a_function_are_saved(tmp_path):
    scores = torch.tensor([[0.5], [1.5]])
    maps = {"rollout": torch.rand(2, 1, 4, 6)}
    found = Explanation(maps, torch.full((2, 1), -1), scores, scores, torch.rand(2, 3, 16, 24))
    for path in ("maps.safetensors", "folder"):
        found.save(tmp_path / path)
        read = load_file(tmp_path / path if path.endswith("safetensors") else tmp_path / path / "maps.safetensors")
        assert torch.equal(read["scores"], read["logits"])


@pytest.mark.parametrize(
    ("task", "headings"),
    [
        ("multiclass", [("b", 0.5), ("a", 0.25)]),
        ("multilabel", [("b", 2 / 3), ("a", 0.5)]),
        ("regression", [("0.693 b", None), ("0 a", None)]),
    ],
)
def test_columns_are_headed_by_what_the_networks_outputs_are(task, headings):
    logits = torch.tensor([[0.0, float(np.log(2)), 0.0]])
    target = torch.tensor([[1, 0]])
    found = Explanation(
        {"rollout": torch.rand(1, 2, 4, 6)}, target, logits, logits.gather(1, target), torch.rand(1, 3, 16, 24),
        ("a", "b", "c"), (), task,
    )  # fmt: skip
    names, probabilities = found._headings([(0, 0), (0, 1)])
    assert names == [name for name, _ in headings]
    assert probabilities == pytest.approx([value for _, value in headings], abs=1e-6)


def test_an_unknown_method_is_named():
    with pytest.raises(ValueError, match="unknown method 'gradcam': choose from rollout, token_relevance"):
        explanation(torch.rand(1, 3, 16, 24)).overlay(0, "gradcam")
