import pytest
from tiny_network import tiny

from gmarpp.network.build import build_model
from gmarpp.network.preprocessing import set_preprocessing


def test_unknown_architecture_suggests_names():
    with pytest.raises(
        ValueError, match=r"unknown architecture 'vit_bse_patch16_224'; close names: .*vit_base_patch16_224"
    ):
        build_model("vit_bse_patch16_224", 2)
    with pytest.raises(ValueError, match=r"close names: .*vit_base_patch16_224\.augreg"):
        build_model("vit_base_patch16_224.augrag", 2)


def test_impossible_options_are_named():
    with pytest.raises(ValueError, match=r"image_size 36x36 .*8-pixel patches"):
        tiny(image_size=36)
    with pytest.raises(ValueError, match="dpeth"):
        build_model("test_vit", 2, model_args={"dpeth": 3})
    with pytest.raises(ValueError, match="unknown preprocessing 'avg': choose from mean"):
        set_preprocessing(tiny(), {"avg": [0, 0, 0]})
