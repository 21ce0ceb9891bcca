import pytest
import torch
from tiny_network import tiny

from gmarpp.network.build import build_model, undrawn_weights
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


@pytest.mark.parametrize(
    ("architecture", "size", "options"),
    [
        ("test_vit", 32, {}),
        # has buffers that are no part of its weights
        ("swin_tiny_patch4_window7_224", 56, {"embed_dim": 12, "depths": [1, 1], "num_heads": [1, 2]}),
        ("vit_small_patch16_dinov3", 32, {"embed_dim": 24, "depth": 1, "num_heads": 2}),
    ],
)
def test_undrawn_weights_leave_only_what_is_loaded_to_be_set(architecture, size, options):
    drawn = build_model(architecture, 3, size, options).eval()
    state = torch.get_rng_state()
    with undrawn_weights():
        undrawn = build_model(architecture, 3, size, options).eval()
    assert torch.equal(torch.get_rng_state(), state)
    undrawn.load_state_dict(drawn.state_dict())
    images = torch.randn(2, 3, size, size)
    assert torch.equal(undrawn(images), drawn(images))
    assert not torch.equal(torch.get_rng_state(), state)
    assert build_model("test_vit", 3).head.weight.std() > 0
