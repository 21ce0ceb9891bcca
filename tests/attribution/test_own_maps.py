import pytest
import torch
import torch.nn.functional as F
from naive_attribution import attention_and_gradients, layer_matrix
from small_networks import batch, vit

import gmarpp
from gmarpp.attribution import GMARPlusPlus, Rollout


def saliency(model, images, target):
    model(images).gather(1, target[:, None]).sum().backward()
    model.zero_grad()
    return images.grad.abs()


SALIENCY = gmarpp.FunctionMethod("saliency", saliency, "Saliency")


def naive_saliency(model, images, target):
    pixels = images.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model(pixels).gather(1, target[:, None]).sum(), pixels)
    return F.avg_pool2d(gradient.abs().mean(1, keepdim=True), 8)[:, 0]


@pytest.mark.parametrize("methods", [[SALIENCY], ["legrad", SALIENCY, "rollout"]])
def test_maps_are_those_of_the_function_alone_and_beside_others(methods):
    model, images = vit(), batch()[0]
    found = gmarpp.explain(model, images, methods)
    assert list(found.maps) == [getattr(each, "name", each) for each in methods]
    assert torch.equal(found.target, model(images).argmax(1))
    torch.testing.assert_close(found.logits, model(images).detach())
    torch.testing.assert_close(found.maps["saliency"], naive_saliency(model, images, found.target))


def test_several_classes_per_image_have_a_map_each():
    model, images = vit(), batch()[0]
    target = torch.tensor([[0, 4], [1, 3], [2, 2]])
    found = gmarpp.explain(model, images, SALIENCY, target).maps["saliency"]
    for column in range(2):
        torch.testing.assert_close(found[:, column], naive_saliency(model, images, target[:, column]))


def test_pixels_that_no_patch_covers_do_not_count():
    model, images = vit(img_size=30), torch.rand(2, 3, 30, 30)
    method = gmarpp.FunctionMethod("brightness", lambda model, images, target: images[:, 0])
    found = gmarpp.explain(model, images, method).maps["brightness"]
    torch.testing.assert_close(found, F.avg_pool2d(images[:, :1, :24, :24], 8)[:, 0])


def test_the_network_is_left_as_it_was():
    model, images = vit().train(), batch()[0]
    model(images).sum().backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    modes = []
    method = gmarpp.FunctionMethod("mode", lambda net, x, _: modes.append(net.training) or saliency(net, x, _))
    with torch.inference_mode():
        gmarpp.explain(model, images, method)
    assert modes == [False]
    assert model.training
    assert all(torch.equal(p.grad, before) for p, before in zip(model.parameters(), gradients, strict=True))
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (
            lambda model, images, target: torch.ones(3, 5, 4),
            r"\(3, 4, 4\), or \(3, 32, 32\) of pixels, got \(3, 5, 4\)",
        ),
        (lambda model, images, target: torch.ones(1, 4, 4), r"got \(1, 4, 4\)"),
        (lambda model, images, target: images.detach().numpy(), "got ndarray: return a tensor"),
        (
            lambda model, images, target: images.log(),
            r"expected finite maps, got NaN or infinite .* images \[0, 1, 2\]",
        ),
    ],
)
def test_maps_that_cannot_be_used_name_their_method(function, message):
    with pytest.raises(ValueError, match=f"mine: .*{message}"):
        gmarpp.explain(vit(), batch()[0], ["rollout", gmarpp.FunctionMethod("mine", function)])


@pytest.mark.parametrize("target", [gmarpp.Contrast(0, 1), lambda output: output[:, 0]])
def test_targets_that_are_no_classes_are_refused(target):
    with pytest.raises(ValueError, match="saliency: expected classes as target, got a"):
        gmarpp.explain(vit(), batch()[0], ["gmarpp_l1", SALIENCY], target)


@pytest.mark.parametrize(("start", "name"), [(1, "gmarpp_l1"), (2, "rollout")])
def test_layers_below_the_start_are_skipped(start, name):
    model, images = vit(depth=3), batch()[0]
    kind = {"gmarpp_l1": GMARPlusPlus, "rollout": Rollout}[name]
    found = gmarpp.explain(model, images, [kind(name="late", start_layer=start), name], 1).maps
    attentions, gradients = attention_and_gradients(model, images, lambda logits: logits[:, 1])
    for image in range(len(images)):
        row = torch.eye(17)[0]
        for layer in (2, 1, 0):
            if layer == start - 1:
                late = row
            row = row @ layer_matrix(name, attentions[layer][image], gradients[layer][image])
        torch.testing.assert_close(found["late"][image].flatten(), late[1:], rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(found[name][image].flatten(), row[1:], rtol=1e-4, atol=1e-7)


def test_a_start_above_the_last_layer_is_refused():
    with pytest.raises(ValueError, match="start_layer: expected less than the network's 2 layers, got 2"):
        gmarpp.explain(vit(), batch()[0], [Rollout(start_layer=2), "legrad"])
    with pytest.raises(ValueError, match="rollout: start_layer: expected 0 or more, got -1"):
        Rollout(start_layer=-1)
