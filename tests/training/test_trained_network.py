import lightning as L
import pytest
import timm
import torch
import transformers
from small_networks import vit
from torch import nn

from gmarpp.training.trained_network import trained_network

IMAGES = torch.rand(2, 3, 32, 32)


class Module(L.LightningModule):
    """A module whose forward is given, or none."""

    def __init__(self, forward=None, **parts):
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)
        self.run = forward


class WithForward(Module):
    def forward(self, images):
        return self.run(self, images)


class WithNamedForward(Module):
    def forward(self, pixel_values, labels):
        return self.model(pixel_values=pixel_values, labels=labels)


def hugging_face():
    config = transformers.ViTConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8
    )
    return transformers.ViTForImageClassification(config)


def test_the_innermost_module_that_does_all_of_the_forward_is_the_network():
    net, model = vit(), hugging_face()
    assert trained_network(Module(net=net), IMAGES) is net
    assert trained_network(Module(net=nn.Sequential(net), loss=nn.CrossEntropyLoss()), IMAGES) is net
    assert trained_network(Module(net=torch.compile(net)), IMAGES) is net
    assert trained_network(WithForward(lambda module, x: module.net(x), net=net, teacher=vit()), IMAGES) is net
    assert trained_network(Module(model=model), IMAGES) is model
    assert trained_network(WithNamedForward(model=model), IMAGES) is model
    assert trained_network(WithForward(lambda module, x: module.m(pixel_values=x).logits, m=model), IMAGES) is model
    module = Module(student=nn.ModuleDict({"net": net}), teacher=vit())
    assert trained_network(module, IMAGES, "student.net") is net


def two_parts(module, images):
    return module.head(module.backbone(images))


@pytest.mark.parametrize(
    ("forward", "parts"),
    [
        (two_parts, {"backbone": vit(num_classes=0), "head": nn.Linear(32, 5)}),
        (lambda module, images: module.net((images - 0.5) / 0.5), {"net": vit()}),
        (lambda module, images: module.net(images) / 0.07, {"net": vit()}),
        (lambda module, images: module.net(images).softmax(dim=1), {"net": vit()}),
    ],
    ids=["head of its own", "normalizes", "temperature", "softmax"],
)
def test_a_module_whose_forward_does_more_is_the_network_itself(forward, parts):
    module = WithForward(forward, **parts)
    assert trained_network(module, IMAGES) is module


def test_the_module_is_left_as_it_was():
    module = WithForward(two_parts, backbone=vit(num_classes=0, drop_rate=0.5), head=nn.Linear(32, 5)).train()
    module.backbone.blocks[0].eval()
    module.head.weight.requires_grad_(False)
    modes = [each.training for each in module.modules()]
    state = torch.get_rng_state()
    trained_network(module, IMAGES)
    assert [each.training for each in module.modules()] == modes
    assert [name for name, each in module.named_parameters() if not each.requires_grad] == ["head.weight"]
    assert not any(each._forward_hooks for each in module.modules())
    assert all(each.grad is None for each in module.parameters())
    assert torch.equal(torch.get_rng_state(), state)


LINE = r"AttributionMonitor\(network='{}'\)"


@pytest.mark.parametrize(
    ("module", "name", "message"),
    [
        (Module(net=vit()), "nets", "unknown module 'nets' of Module: choose from net"),
        (Module(student=vit(), teacher=vit()), None, r"2 modules with parameters \(student, teacher\).*" + LINE),
        (Module(), None, r"0 modules with parameters"),
        (WithForward(lambda module, x: module.net(x.pixels), net=vit()), None, r"failed \(.*Error: .*" + LINE),
        (Module(net=vit(num_classes=0, global_pool="")), None, r"expected logits .* got \(2, 17, 32\).*" + LINE),
        (
            WithForward(lambda module, x: {"loss": module.net(x)}, net=vit()),
            None,
            r"expected logits .* got dict.*" + LINE,
        ),
    ],
)
def test_what_is_no_network_says_what_to_write(module, name, message):
    with pytest.raises(ValueError, match=message.format(next(iter(dict(module.named_children())), ""))):
        trained_network(module, IMAGES, name)
    assert not any(each._forward_hooks for each in module.modules())


def test_a_network_without_attention_is_found_too():
    net = timm.create_model("test_resnet", num_classes=3)
    assert trained_network(Module(net=net), IMAGES) is net
