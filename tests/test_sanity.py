import csv
import logging

import pytest
import timm
import torch

import gmarpp
from gmarpp import sanity
from gmarpp.data import Digits
from gmarpp.network.files.save import save_weights
from gmarpp.sanity import sanity_check
from gmarpp.training.module import ViTClassifier


@pytest.fixture
def network():
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=4, embed_dim=48, depth=3, num_heads=3, num_classes=5
    )
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.data.mul_(6)
    return model.eval()


def test_cascade_decorrelates_what_depends_on_the_weights(network):
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    before = {name: value.clone() for name, value in network.state_dict().items()}
    check = sanity_check(network, images, ["gmarpp_l1", "rollout", "random"])
    assert check.stages == ("trained", "head", "block 3", "block 2", "block 1", "embedding")
    assert all(values.shape == (6, 4) for values in check.correlations.values())
    assert (check.correlations["rollout"][:2] > 0.9999).all(), "rollout knows nothing of the head"
    assert check.correlations["gmarpp_l1"][1].mean() < 0.95
    assert check.correlations["gmarpp_l1"][-1].abs().mean() < 0.5
    assert check.unchanged() == ["random"]
    assert check.blind_to_head() == ["rollout", "random"]
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    again = sanity_check(network, images, ["gmarpp_l1"])
    assert torch.equal(again.correlations["gmarpp_l1"], check.correlations["gmarpp_l1"])


class HeadOfTheRoot(torch.nn.Module):
    """A network whose head is a parameter of the outermost module, as CLIP's projection is, and frozen."""

    def __init__(self, network):
        super().__init__()
        self.body, self.head = network, torch.nn.Parameter(network.head.weight.detach().clone(), requires_grad=False)
        network.head = torch.nn.Identity()

    def forward(self, images):
        return self.body(images) @ self.head.T


def test_the_head_is_what_comes_after_the_blocks_whatever_module_owns_it(network):
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    network.head.bias.data.zero_()
    expected = sanity_check(network, images, ["gmarpp_l1"])
    model, layout = HeadOfTheRoot(network), gmarpp.architecture_of(network)
    found = sanity_check(model, images, ["gmarpp_l1"], architecture=layout)
    assert found.stages == expected.stages
    assert found.correlations["gmarpp_l1"][1].mean() < 0.95
    assert found.blind_to_head() == expected.blind_to_head() == []
    assert not model.head.requires_grad
    assert all(each.requires_grad for each in network.parameters())


def test_without_a_head_none_is_randomized(network):
    network.head, network.norm = torch.nn.Identity(), torch.nn.Identity()
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    check = sanity_check(network, images, ["gmarpp_l1"])
    assert check.stages == ("trained", "block 3", "block 2", "block 1", "embedding")
    assert check.blind_to_head() == []


def test_an_architecture_by_hand_is_randomized_and_restored(network):
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    before = {name: value.clone() for name, value in network.state_dict().items()}
    layout = gmarpp.architecture_of(network)
    check = sanity_check(torch.nn.Sequential(network), images, ["gmarpp_l1"], architecture=layout, batch_size=2)
    expected = sanity_check(network, images, ["gmarpp_l1"])
    assert check.stages == expected.stages
    torch.testing.assert_close(check.correlations["gmarpp_l1"], expected.correlations["gmarpp_l1"])
    without_blocks = gmarpp.Architecture(layout.grid, layout.prefix_tokens)
    with pytest.raises(ValueError, match=r"pass them in gmarpp\.Architecture"):
        sanity_check(network, images, architecture=without_blocks)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_command_writes_table_and_figure_and_names_what_does_not_change(tmp_path, caplog):
    torch.manual_seed(0)
    classifier = ViTClassifier("test_vit", num_classes=10, image_size=32, pretrained=False, model_args={"depth": 3})
    save_weights(classifier.model, tmp_path / "vit.safetensors")
    data = Digits(root=str(tmp_path / "data"), train_images=2, val_images=1, num_workers=0)
    with caplog.at_level(logging.WARNING):
        sanity.write_sanity_check(
            data,
            str(tmp_path / "vit.safetensors"),
            output=str(tmp_path / "out"),
            methods=["gmarpp_l1", "random"],
            images=6,
        )
    rows = list(csv.reader((tmp_path / "out" / "sanity.csv").open()))
    assert rows[0] == ["method", "trained", "head", "block 3", "block 2", "block 1", "embedding"]
    assert rows[2] == ["random", *["1.0000"] * 6]
    assert (tmp_path / "out" / "sanity.png").stat().st_size > 10_000
    assert "Random does not change when all parameters are random" in caplog.text


DIGITS = ("--data=Digits", "--data.root=data", "--data.train_images=2", "--data.val_images=2")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "data"),
        ([*DIGITS], "--ckpt_path is missing: expected the file of a trained network"),
        (["--ckpt_path=gone.ckpt", *DIGITS], "there is no checkpoint gone.ckpt"),
        (["--ckpt_path=vit.safetensors", "--data=ImageFolder"], "root"),
        (["--ckpt_path=vit.safetensors", "--data=squares.Squares"], "--data Squares cannot be used"),
        (["--ckpt_path=vit.safetensors", *DIGITS, "--images=0"], "--images: expected at least 1, got 0"),
        (["--ckpt_path=vit.safetensors", *DIGITS, "--images=many"], "images"),
        (["--ckpt_path=vit.safetensors", *DIGITS, "--methods=[gradcamm]"], "unknown method 'gradcamm'"),
        (["--ckpt_path=vit.safetensors", *DIGITS, "--methods=[]"], "expected at least one method"),
        (["--ckpt_path=vit.safetensors", *DIGITS, "--output=taken"], "taken"),
        (["--ckpt_path=vit.safetensors", *DIGITS, "--imagez=3"], "imagez"),
    ],
)
def test_mistakes_end_with_one_line(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    save_weights(ViTClassifier("test_vit", 3, 32, pretrained=False, model_args={"depth": 1}).model, "vit.safetensors")
    (tmp_path / "taken").touch()
    with pytest.raises(SystemExit) as stop:
        sanity.main(arguments)
    assert stop.value.code in (1, 2)
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: ")
    assert message in line
