import contextlib
import gc
import itertools

import pytest
import timm
import torch
import torch.nn.functional as F
from naive_attribution import attention_and_gradients, naive_legrad, naive_row
from torch.utils._python_dispatch import TorchDispatchMode

import gmarpp
from gmarpp.attribution import GMAR, GMARPlusPlus, RandomMap, Rollout
from gmarpp.attribution.descent import Descent

PRODUCTS = ("gmarpp_l1", "gmarpp_l2", "gmar_l1", "gmar_l2", "rollout", "chefer", "attention")


def vit(name="vit_tiny_patch16_224", seed=0, **options):
    torch.manual_seed(seed)
    defaults = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 4, "num_heads": 3, "num_classes": 7}
    model = timm.create_model(name, **(defaults | options)).eval()
    # Networks as initialized have nearly uniform attention, which would hide mistakes.
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.data.mul_(6)
    return model


def images(batch=3, size=(32, 32), seed=1):
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(seed))


def relative_error(found, expected):
    return ((found - expected).abs().max() / expected.abs().max()).item()


def logit_of(target):
    return lambda output: output[torch.arange(len(target)), target]


@pytest.mark.parametrize("recompute", [False, True])
def test_all_methods_equal_the_naive_reference_for_a_class_token(recompute):
    model, batch = vit(), images()
    found = gmarpp.explain(model, batch, gmarpp.METHODS, recompute=recompute)
    target = model(batch).argmax(dim=1)
    assert torch.equal(found.target, target)
    torch.testing.assert_close(found.logits, model(batch).detach())

    attentions, gradients = attention_and_gradients(model, batch, logit_of(target))
    readout = F.one_hot(torch.tensor(0), 17).float()
    for name, image in itertools.product(PRODUCTS, range(3)):
        expected = naive_row(name, attentions, gradients, readout, image)[1:].reshape(4, 4)
        assert relative_error(found.maps[name][image], expected) < 1e-4, name
    head = lambda tokens: model.forward_head(model.norm(tokens))  # noqa: E731
    expected = naive_legrad(model, batch, model.blocks, head, logit_of(target))[:, 1:].reshape(3, 4, 4)
    assert relative_error(found.maps["legrad"], expected) < 1e-4


def test_equals_the_naive_reference_on_the_full_depth_and_width_of_vit_small():
    torch.manual_seed(3)
    model, batch = timm.create_model("vit_small_patch16_224", num_classes=10).eval(), images(1, (224, 224))
    found = gmarpp.explain(model, batch, gmarpp.METHODS, target=4)
    attentions, gradients = attention_and_gradients(model, batch, logit_of(torch.tensor([4])))
    readout = F.one_hot(torch.tensor(0), 197).float()
    for name in PRODUCTS:
        expected = naive_row(name, attentions, gradients, readout, 0)[1:].reshape(14, 14)
        assert relative_error(found.maps[name][0], expected) < 1e-4, name


def test_timms_own_unfused_attention_is_what_the_reference_sees():
    model, batch = vit(), images()
    collected = []
    for block in model.blocks:
        block.attn.fused_attn = False
        block.attn.attn_drop.register_forward_pre_hook(lambda module, args: collected.append(args[0]))
    model(batch)
    attentions, _ = attention_and_gradients(vit(), batch, logit_of(torch.zeros(3, dtype=torch.long)))
    for unfused, attention in zip(collected, attentions, strict=True):
        torch.testing.assert_close(unfused, attention)


def test_methods_asked_for_alone_give_the_maps_of_all_together():
    model, batch = vit(), images()
    together = gmarpp.explain(model, batch, gmarpp.METHODS).maps
    for name in gmarpp.METHODS:
        alone = gmarpp.explain(model, batch, name).maps
        assert list(alone) == [name]
        torch.testing.assert_close(alone[name], together[name], rtol=1e-5, atol=1e-8)


def test_several_classes_per_image_equal_one_class_at_a_time():
    model, batch = vit(), images()
    target = torch.tensor([[0, 3], [6, 1], [2, 2]])
    found = gmarpp.explain(model, batch, gmarpp.METHODS, target)
    assert torch.equal(found.target, target)
    for name, column in itertools.product(gmarpp.METHODS, range(2)):
        expected = gmarpp.explain(model, batch, name, target[:, column]).maps[name]
        torch.testing.assert_close(found.maps[name][:, column], expected, rtol=1e-5, atol=1e-8)
        alone = gmarpp.explain(model, batch, name, target).maps[name]
        torch.testing.assert_close(alone, found.maps[name], rtol=1e-5, atol=1e-8)
    assert (found.maps["gmarpp_l1"][0, 0] != found.maps["gmarpp_l1"][0, 1]).any()


def test_a_layer_without_positive_gradient_is_passed_through():
    model, batch = vit(depth=2), images()
    with torch.no_grad():
        # A residual branch scaled to nothing keeps its attention out of the score: G is zero in that layer.
        model.blocks[1].attn.proj.weight.zero_()
    attentions, gradients = attention_and_gradients(model, batch, logit_of(model(batch).argmax(1)))
    assert gradients[1].abs().max() == 0
    found = gmarpp.explain(model, batch, ["gmarpp_l1", "gmarpp_l2", "gmarpp_sum", "gmar_l1", "chefer"]).maps
    assert all(values.isfinite().all() for values in found.values())
    readout = F.one_hot(torch.tensor(0), 17).float()
    for name, image in itertools.product(("gmarpp_l1", "gmarpp_l2", "gmarpp_sum", "chefer"), range(3)):
        expected = naive_row(name, attentions, gradients, readout, image)[1:].reshape(4, 4)
        torch.testing.assert_close(found[name][image], expected, rtol=1e-4, atol=1e-9)


def test_gmar_with_equal_weights_is_rollout_and_alpha_is_an_option():
    model, batch = vit(num_heads=1), images()
    maps = gmarpp.explain(model, batch, ["gmar_l1", "rollout", Rollout(alpha=0.25, name="weaker")]).maps
    torch.testing.assert_close(maps["gmar_l1"], maps["rollout"])
    attentions, gradients = attention_and_gradients(model, batch, logit_of(model(batch).argmax(1)))
    readout = F.one_hot(torch.tensor(0), 17).float()
    expected = naive_row("rollout", attentions, gradients, readout, 0, alpha=0.25)[1:].reshape(4, 4)
    assert relative_error(maps["weaker"][0], expected) < 1e-4


def test_without_residual_a_row_without_relevance_is_handed_on():
    model, batch = vit(depth=3), images()
    with torch.no_grad():
        model.blocks[1].attn.proj.weight.zero_()  # no gradient there, and so no relevance in the whole layer
    methods = [GMARPlusPlus(alpha=0), Rollout(alpha=0)]
    found = gmarpp.explain(model, batch, methods).maps
    attentions, gradients = attention_and_gradients(model, batch, logit_of(model(batch).argmax(1)))
    readout = F.one_hot(torch.tensor(0), 17).float()
    for name in ("gmarpp_l1", "rollout"):
        row = readout
        for attention, gradient in zip(reversed(attentions), reversed(gradients), strict=True):
            heads = attention[0] if name == "rollout" else gradient[0].relu() * attention[0]
            weights = torch.ones(3) if name == "rollout" else gradient[0].relu().sum((1, 2))
            relevance = torch.einsum("h,hqk->qk", weights, heads)
            sums = relevance.sum(-1)
            row = (row / sums.where(sums > 0, 1)) @ relevance + row * (sums == 0)
        assert relative_error(found[name][0], row[1:].reshape(4, 4)) < 1e-4


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Rollout(alpha=-1.0), "rollout: alpha: expected 0 or more"),
        (lambda: GMAR(alpha=float("nan")), "gmar_l1: alpha: expected 0 or more"),
        (lambda: GMAR(norm=3), "gmar_l1: unknown norm 3: choose from 1, 2"),
        (lambda: GMARPlusPlus(norm=0), "gmarpp_l1: unknown norm 0: choose from 1, 2, None"),
    ],
)
def test_bad_options_of_methods_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_random_maps_depend_on_seed_and_image_only():
    model, batch = vit(), images()
    found = gmarpp.explain(model, batch, "random").maps["random"]
    alone = gmarpp.explain(model, batch[2:], "random").maps["random"]
    assert torch.equal(found[2:], alone)
    assert (found[0] != found[1]).all()
    other = gmarpp.explain(model, batch, RandomMap(seed=1)).maps["random"]
    assert (other != found).all()


@pytest.mark.parametrize("fails", [False, True])
def test_the_network_is_left_as_it_was_found(fails):
    model, batch = vit(drop_path_rate=0.5), images()
    model.train()
    model.blocks[1].eval()
    model.head.weight.requires_grad_(False)
    model.head.bias.grad = torch.ones(7)
    modes = [module.training for module in model.modules()]
    trainable = [parameter.requires_grad for parameter in model.parameters()]
    fused = F.scaled_dot_product_attention
    if fails:
        with pytest.raises(ValueError, match="targets: expected 0 to"):
            gmarpp.explain(model, batch, gmarpp.METHODS, target=99, recompute=True)
    else:
        gmarpp.explain(model, batch, gmarpp.METHODS, recompute=True)
    assert modes == [module.training for module in model.modules()]
    assert trainable == [parameter.requires_grad for parameter in model.parameters()]
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert len(gradients) == 1
    assert torch.equal(gradients[0], torch.ones(7))
    assert F.scaled_dot_product_attention is fused
    assert torch.backends.mha.get_fastpath_enabled()
    assert not any(
        "forward" in vars(module) or module._forward_hooks or module._forward_pre_hooks for module in model.modules()
    )


@pytest.mark.parametrize("methods", [gmarpp.METHODS, "legrad", "rollout", "gmarpp_l1"])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("fails", [False, True])
def test_nothing_of_the_pass_stays_in_memory(methods, recompute, fails):
    def score(logits):
        if fails:
            raise ZeroDivisionError
        return logits[:, 0]

    gc.collect()
    gc.disable()
    try:
        with pytest.raises(ZeroDivisionError) if fails else contextlib.nullcontext():
            gmarpp.explain(vit(), images(), methods, score, recompute=recompute)
        if fails:
            gc.collect()  # of the traceback, which holds its frames
        assert not [each for each in gc.get_objects() if type(each) is Descent]
    finally:
        gc.enable()


def test_dropout_of_a_training_network_is_off_during_explanation():
    model, batch = vit(proj_drop_rate=0.5, attn_drop_rate=0.5), images()
    expected = gmarpp.explain(model.eval(), batch, gmarpp.METHODS).maps
    found = gmarpp.explain(model.train(), batch, gmarpp.METHODS).maps
    assert all(torch.equal(found[name], expected[name]) for name in found)


@pytest.mark.parametrize("pool", ["token", "avg"])
@pytest.mark.parametrize("recompute", [False, True])
def test_a_network_with_activation_checkpointing_is_explained_alike(pool, recompute):
    model, batch = vit(global_pool=pool), images()
    expected = gmarpp.explain(model, batch, gmarpp.METHODS).maps
    model.set_grad_checkpointing(True)
    found = gmarpp.explain(model, batch, gmarpp.METHODS, recompute=recompute).maps
    assert model.grad_checkpointing is True
    for name in gmarpp.METHODS:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-8)


class HalfInside(torch.nn.Module):
    """A network that takes float32 images and computes in float16."""

    def __init__(self, model):
        super().__init__()
        self.model = model.half()

    def forward(self, images):
        return self.model(images.half())


def test_small_gradients_survive_float16():
    model, batch = vit(), images()
    tiny = 2.0**-22

    def score(logits):
        return logits[:, 0] * tiny

    expected = gmarpp.explain(model, batch, "chefer", score).maps["chefer"]
    with torch.autocast("cpu", torch.float16):
        autocast = gmarpp.explain(model, batch, "chefer", lambda logits: score(logits.float())).maps["chefer"]
    layout, inside = gmarpp.architecture_of(model), HalfInside(model)
    half = gmarpp.explain(inside, batch, "chefer", score, architecture=layout).maps["chefer"]
    for found in (autocast, half):
        assert torch.corrcoef(torch.stack((found.flatten(), expected.flatten())))[0, 1] > 0.98


def saved_tensors(run):
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: sizes.append(tensor.numel()) or tensor, lambda x: x):
        run()
    return len(sizes)


def test_methods_without_gradients_keep_nothing_below_the_top_layer():
    shallow, deep = (
        saved_tensors(lambda d=depth: gmarpp.explain(vit(depth=d), images(), "rollout")) for depth in (2, 6)
    )
    assert shallow == deep


def test_works_inside_inference_mode_and_no_grad():
    model, batch = vit(), images()
    expected = gmarpp.explain(model, batch, gmarpp.METHODS).maps
    with torch.inference_mode():
        made_inside = batch + 0
        assert made_inside.is_inference()
        found = gmarpp.explain(model, made_inside, gmarpp.METHODS).maps
    with torch.no_grad():
        again = gmarpp.explain(model, batch, gmarpp.METHODS).maps
    for name in gmarpp.METHODS:
        assert torch.equal(found[name], expected[name])
        assert torch.equal(again[name], expected[name])
        assert not found[name].is_inference()
        assert not found[name].requires_grad


class NewTensorSizes(TorchDispatchMode):
    """Collects the size of every tensor that does not share the storage of a parameter."""

    def __init__(self, model):
        super().__init__()
        self.parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        self.sizes = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in self.parameters:
                self.sizes.append(tensor.numel())
        return result


def test_no_gradient_of_a_parameter_is_ever_allocated():
    model, batch = vit(mlp_ratio=64), images(1)
    largest_activation = 17 * 48 * 64  # a class token and 16 patches
    assert model.blocks[0].mlp.fc1.weight.numel() > 2 * largest_activation
    with NewTensorSizes(model) as allocated:
        gmarpp.explain(model, batch, gmarpp.METHODS)
    assert max(allocated.sizes) == largest_activation
    with NewTensorSizes(model) as allocated:
        model(batch).sum().backward()
    assert max(allocated.sizes) > 2 * largest_activation


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_and_half_weights_agree_with_float32(dtype):
    model, batch = vit(), images()
    target = model(batch).argmax(dim=1)
    expected = gmarpp.explain(model, batch, gmarpp.METHODS, target).maps
    with torch.autocast("cpu", dtype):
        autocast = gmarpp.explain(model, batch, gmarpp.METHODS, target).maps
    half = gmarpp.explain(model.to(dtype), batch.to(dtype), gmarpp.METHODS, target).maps
    alone = gmarpp.explain(model, batch.to(dtype), "legrad", target).maps
    for name in (*PRODUCTS, "legrad"):
        for found in (autocast[name], half[name], *([alone[name]] if name in alone else [])):
            assert found.dtype == torch.float32
            correlation = torch.corrcoef(torch.stack((found.flatten(), expected[name].flatten())))[0, 1]
            assert correlation > 0.98, name


def test_bad_targets_and_images_are_named():
    model, batch = vit(), images()
    with pytest.raises(ValueError, match=r"targets: expected 0 to 6 for 7 classes, got 0 to 7"):
        gmarpp.explain(model, batch, target=torch.tensor([0, 7, 1]))
    with pytest.raises(ValueError, match=r"targets: expected shape \(3,\).*, got \(2,\)"):
        gmarpp.explain(model, batch, target=[0, 1])
    with pytest.raises(ValueError, match="integer type"):
        gmarpp.explain(model, batch, target=torch.zeros(3))
    with pytest.raises(ValueError, match=r"shape \(images, channels, height, width\)"):
        gmarpp.explain(model, batch[0])
    with pytest.raises(ValueError, match="floating-point"):
        gmarpp.explain(model, batch.to(torch.uint8))
    with pytest.raises(ValueError, match="on cpu and the images are on meta"):
        gmarpp.explain(model, batch.to("meta"))
    with pytest.raises(ValueError, match="unknown method 'gmar_l3': choose from gmarpp_l1"):
        gmarpp.explain(model, batch, "gmar_l3")
    with pytest.raises(ValueError, match="two different methods are named 'gmarpp_l1'"):
        gmarpp.explain(model, batch, ["gmarpp_l1", GMARPlusPlus(alpha=2)])
    model.class_names = ("crane", "wolf", "crane", "10", "a", "b", "c")
    with pytest.raises(ValueError, match=r"'crane' names several classes, \[0, 2\]"):
        gmarpp.explain(model, batch, target="crane")
    assert gmarpp.explain(model, batch, target="10").target.tolist() == [3, 3, 3]
    assert gmarpp.explain(model, batch, target="6").target.tolist() == [6, 6, 6]
    model.head.bias.data.fill_(float("nan"))
    with pytest.raises(ValueError, match=r"logits of images \[0, 1, 2\] are not finite"):
        gmarpp.explain(model, batch)


def test_an_explanation_draws_itself():
    model, batch = vit(img_size=(24, 48)), images(2, (24, 48))
    model.class_names = tuple("abcdefg")
    model.pretrained_cfg = {"mean": (0.5, 0.25, 0.0), "std": (0.5, 0.5, 1.0)}
    found = gmarpp.explain(model, batch, ["gmarpp_l1", "rollout"], target=[[0, 3], [1, 2]])
    torch.testing.assert_close(found.images[:, 1], (batch[:, 1] * 0.5 + 0.25).clamp(0, 1))
    picture = found.overlay(1, "rollout", column=1)
    assert picture.width == 2 * picture.height
    assert picture.tobytes() != found.overlay(1, "gmarpp_l1", column=1).tobytes()
    texts = [text.get_text() for text in found.show().axes[0].texts]
    assert {"a", "d", "b", "c"} <= set(texts)
    stretched = gmarpp.explain(vit(), images(2)).images.amin(dim=(1, 2, 3))
    assert stretched.shape == (2,)


@pytest.mark.parametrize(("channels", "shown"), [(1, [0, 0, 0]), (4, [0, 1, 2])])
def test_images_of_other_channels_are_shown(channels, shown):
    model = vit(in_chans=channels)
    batch = torch.rand(2, channels, 32, 32)
    batch[:, :, 0, :2] = torch.tensor([0.0, 1.0])
    found = gmarpp.explain(model, batch)
    torch.testing.assert_close(found.images, batch[:, shown])


def test_a_score_of_ones_own_has_no_class_name():
    model, batch = vit(), images(2)
    model.class_names = tuple("abcdefg")
    found = gmarpp.explain(model, batch, target=lambda logits: logits[:, 2] - logits[:, 3])
    texts = [text.get_text() for text in found.show().axes[0].texts]
    assert {f"score {score:.3g}" for score in found.logits[:, 0].tolist()} <= set(texts)
    assert not any("%" in text for text in texts)
    assert found.class_names == ()
