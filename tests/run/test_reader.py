import numpy as np
import pytest
import torch
from PIL import Image
from stored_run import CLASS_NAMES, METHODS, METRICS, run_description, shard, stored_run

from gmarpp.run.folder import write_run
from gmarpp.run.reader import load_explanations
from gmarpp.run.shards import read_shard, reopen_maps

PATHS = [f"folder/{number}.jpg" for number in range(7)]


@pytest.fixture
def explanations(tmp_path):
    return stored_run(tmp_path / "run", PATHS, shard_size=3)


def test_maps_are_those_that_were_stored(explanations):
    original = shard(range(7), PATHS)
    assert len(explanations) == 7
    assert explanations.indices == tuple(range(7))
    assert explanations.methods == METHODS
    assert explanations.metrics == METRICS
    assert torch.equal(explanations.maps("rollout"), original.tensors["rollout"])
    for index in (0, 4, 6):
        assert torch.equal(explanations.map(index, "gmarpp_l1"), original.tensors["gmarpp_l1"][index])


def test_the_run_says_which_maps_are_signed(explanations, tmp_path):
    assert explanations.signed_methods == ()
    assert stored_run(tmp_path / "signed", PATHS, signed_methods=["rollout"]).signed_methods == ("rollout",)
    write_run(tmp_path / "signed", {**run_description(), "signed_methods": "rollout"})
    with pytest.raises(ValueError, match="signed_methods: expected a list of texts, got 'rollout'"):
        load_explanations(tmp_path / "signed")


def test_of_many_maps_each_file_is_checked_once(explanations, monkeypatch):
    read = []
    monkeypatch.setattr("gmarpp.run.reader.read_shard", lambda path: read.append(path.name) or read_shard(path))
    for index in (5, 4, 3, 5):
        assert explanations.map(index, "rollout").shape == (4, 6)
    assert read == ["00001.safetensors"]


def test_one_picture_is_read_by_its_index(explanations):
    with explanations.image(4) as image, Image.open(explanations.folder / "images" / "000004-4.jpg") as expected:
        assert image.tobytes() == expected.tobytes()
    assert [row["path"] for row in explanations.rows] == PATHS


def test_table_has_a_record_per_image_and_method(explanations):
    table = explanations.table
    assert len(table) == 7 * 3
    first = table[0]
    assert first["path"] == "folder/0.jpg"
    assert (first["label"], first["label_name"]) == (None, None)
    assert (first["target"], first["target_name"]) == (0, CLASS_NAMES[0])
    assert first["overlay"] == "overlays/gmarpp_l1/000000-0.png"
    record = table[4 * 3 + 1]
    assert (record["index"], record["method"]) == (4, "rollout")
    assert record["insertion_auc"] == explanations.values["rollout"]["insertion_auc"][4]
    assert np.isnan(table[3]["average_drop"])


def test_pictures_are_where_it_says(explanations):
    with Image.open(explanations.image_path(3)) as image:
        assert image.size == (36, 24)
    assert explanations.overlay_path(3, "rollout") == explanations.folder / "overlays" / "rollout" / "000003-3.png"


def test_mean_curves_are_over_all_shards(explanations):
    insertion, deletion = explanations.mean_curves()
    original = shard(range(7), PATHS).tensors
    np.testing.assert_allclose(insertion["rollout"].mean, original["rollout/insertion"].mean(0), rtol=1e-6)
    np.testing.assert_allclose(deletion["random"].mean, original["random/deletion"].mean(0), rtol=1e-6)


def test_what_is_not_there_is_named(explanations):
    with pytest.raises(KeyError, match="no image with index 99"):
        explanations.map(99, "rollout")
    with pytest.raises(KeyError, match=r"no maps of 'legrad'.*gmarpp_l1, rollout"):
        explanations.map(0, "legrad")
    with pytest.raises(KeyError, match="no image with index 99"):
        explanations.image_path(99)
    with pytest.raises(KeyError, match="no image with index 99"):
        explanations.image(99)


def test_a_folder_without_a_complete_run_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no explanations"):
        load_explanations(tmp_path)
    write_run(tmp_path, run_description())
    with pytest.raises(ValueError, match=r"interrupted.*resume"):
        load_explanations(tmp_path)


def test_a_run_killed_when_images_were_added_is_refused(explanations):
    (explanations.folder / "parts").mkdir()
    reopen_maps(explanations.folder)
    with pytest.raises(ValueError, match=r"interrupted.*resume"):
        load_explanations(explanations.folder)
