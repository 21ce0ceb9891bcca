"""Images are prepared as transformers' processors prepare them, in the words of timm."""

import pytest

from gmarpp.network.files.image_processor import processor_preprocessing

NORMALIZED = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6], "resample": 3}


@pytest.mark.parametrize(
    ("options", "size", "crop_pct", "crop_mode"),
    [
        ({}, (64, 64), 1.0, "squash"),
        ({"size": {"height": 48, "width": 32}}, (48, 32), 1.0, "squash"),
        # A crop that is switched off is none.
        ({"size": 32, "crop_size": 16, "do_center_crop": False}, (32, 32), 1.0, "squash"),
        # DeiT: both edges to 256, then the center.
        ({"size": 256, "crop_size": 224, "do_center_crop": True}, (224, 224), 0.875, "squash"),
        # DINOv2 and CLIP: the shorter edge, then the center.
        (
            {"size": {"shortest_edge": 256}, "crop_size": {"height": 224, "width": 224}, "do_center_crop": True},
            (224, 224),
            0.875,
            "center",
        ),
        (
            {"size": 224, "crop_size": 224, "do_center_crop": True, "feature_extractor_type": "CLIPFeatureExtractor"},
            (224, 224),
            1.0,
            "center",
        ),
        ({"size": {"shortest_edge": 128}}, (64, 64), 0.5, "center"),
    ],
)
def test_size_and_crop(options, size, crop_pct, crop_mode):
    found, rest = processor_preprocessing({**NORMALIZED, **options}, (64, 64), resample=2)
    assert (found, rest["crop_pct"], rest["crop_mode"]) == (size, crop_pct, crop_mode)
    assert (rest["mean"], rest["std"], rest["interpolation"]) == ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6], "bicubic")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        # What becomes of white, red, green and blue alike: (scale - mean) / std.
        ({}, (1 - 0.1) / 0.4),
        ({"do_normalize": False}, 1.0),
        ({"rescale_factor": 2 / 255}, (2 - 0.1) / 0.4),
        ({"do_rescale": False}, (255 - 0.1) / 0.4),
        ({"do_rescale": False, "do_normalize": False}, 255.0),
    ],
)
def test_white_becomes_what_it_becomes_there(options, expected):
    _, rest = processor_preprocessing({**NORMALIZED, **options}, (64, 64), resample=2)
    assert (1 - rest["mean"][0]) / rest["std"][0] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": {"height": 32}}, "size: expected one or two sides"),
        (
            {"size": {"height": 200, "width": 400}, "crop_size": 100, "do_center_crop": True},
            "crop_size: expected the shape of size 200x400, got 100x100",
        ),
        ({"size": {"shortest_edge": 32}}, "shortest_edge: expected an integer from 64"),
        ({"image_mean": [0.5]}, "image_mean: expected three numbers"),
        ({"image_std": [0, 1, 1]}, "image_std: expected positive numbers, got 0"),
        ({"resample": 7}, "unknown resample 7: choose from 0, 1, 2, 3, 4, 5"),
        ({"do_normalize": 1}, "unknown do_normalize 1: choose from True, False"),
        ({"rescale_factor": "1/255"}, "rescale_factor: expected positive numbers, got '1/255'"),
    ],
)
def test_what_cannot_be_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        processor_preprocessing({**NORMALIZED, **options}, (64, 64), resample=2)
