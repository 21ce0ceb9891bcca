"""The balanced gradient and its methods against an implementation of their own."""

import contextlib
import dataclasses
import gc
import itertools
import threading
import warnings

import open_clip
import pytest
import torch
import torch.nn.functional as F
from naive_balanced import (
    balanced_run,
    constants_held,
    hold_by_class,
    margin_of,
    naive_balanced_rollout,
    naive_token_relevance,
)
from test_explain import images, logit_of, relative_error, vit
from test_families import NETWORKS, shares, sharpened, timm_network

import gmarpp
from gmarpp.attribution import Method, balanced, way_down
from gmarpp.attribution.descent import Descent
from gmarpp.attribution.relevance import Relevance
from gmarpp.attribution.stream import Entered
from gmarpp.network.output import logits_of

BOTH = ("token_relevance", "gmarpp_balanced")
TARGET = torch.tensor([1, 4, 2])
OTHERS = {
    "timm, residual post-norm": (
        lambda: timm_network("vit_base_patch16_rpn_224"), (32, 32), (4, 4), 0, range(16),
    ),
    "timm, root mean square norms by hand": (
        lambda: timm_network("vit_base_patch16_xp_224"), (32, 32), (4, 4), 1, [0],
    ),
    "timm, QuickGELU and a norm before the blocks": (
        lambda: timm_network("vit_base_patch16_clip_quickgelu_224"), (32, 32), (4, 4), 1, [0],
    ),
}  # fmt: skip


def assert_equals_the_reference(found, run, readout, prefix):
    batch, height, width = found["token_relevance"].shape
    expected = naive_token_relevance(run, prefix).view(batch, height, width)
    assert relative_error(found["token_relevance"], expected) < 1e-4
    for image in range(batch):
        expected = naive_balanced_rollout(run, readout, image)[prefix:].view(height, width)
        assert relative_error(found["gmarpp_balanced"][image], expected) < 1e-4


@pytest.mark.parametrize("name", NETWORKS | OTHERS)
def test_every_family_and_readout_equals_the_reference(name):
    make, size, grid, prefix, read = (NETWORKS | OTHERS)[name]
    model, batch = make(), images(2, size)
    target = torch.tensor([2, 5])
    layout = gmarpp.architecture_of(model)
    found = gmarpp.explain(model, batch, BOTH, target)
    assert torch.equal(found.logits, gmarpp.explain(model, batch, "gmarpp_l1", target).logits)
    assert torch.equal(found.scores, found.logits[[0, 1], target])
    score = lambda output: margin_of(target)(logits_of(output))  # noqa: E731
    run = balanced_run(model, batch, score, layout.blocks)
    assert_equals_the_reference(found.maps, run, shares(prefix + grid[0] * grid[1], read), prefix)


def reference(model, batch, target, score=None):
    return balanced_run(model, batch, score or margin_of(target), model.blocks)


@pytest.mark.parametrize("options", [{}, {"recompute": True}])
def test_methods_asked_for_alone_and_beside_others_are_the_same(options):
    model, batch = vit(), images()
    run = reference(model, batch, TARGET)
    together = gmarpp.explain(model, batch, gmarpp.METHODS + gmarpp.VARIANTS, TARGET, **options)
    assert_equals_the_reference(together.maps, run, shares(17, [0]), 1)
    for methods in ("token_relevance", "gmarpp_balanced", ("token_relevance", "random", "rollout", "legrad")):
        alone = gmarpp.explain(model, batch, methods, TARGET, **options).maps
        for name, maps in alone.items():
            torch.testing.assert_close(maps, together.maps[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"recompute": True}])
def test_plain_maps_are_those_of_calls_without_the_rule(options):
    for model in (vit(), timm_network("eva02_tiny_patch14_224", mlp_ratio=2)):
        batch = images()
        for target in (None, [[0, 3], [6, 1], [2, 2]]):
            expected = gmarpp.explain(model, batch, gmarpp.METHODS, target, **options)
            found = gmarpp.explain(model, batch, (*BOTH, *gmarpp.METHODS), target, **options)
            assert torch.equal(found.logits, expected.logits)
            assert torch.equal(found.scores, expected.scores)
            for name, maps in expected.maps.items():
                assert relative_error(found.maps[name], maps) < 1e-6, name


def test_several_classes_contrasts_and_functions():
    model, batch = vit(), images()
    target = torch.stack((TARGET, torch.tensor([0, 0, 6])), dim=1)
    found = gmarpp.explain(model, batch, (*BOTH, "gmarpp_l1"), target).maps
    for column in range(2):
        run = reference(model, batch, target[:, column])
        assert_equals_the_reference({name: found[name][:, column] for name in BOTH}, run, shares(17, [0]), 1)

    difference = lambda logits: logits[[0, 1, 2], TARGET] - logits[:, 3]  # noqa: E731
    run = reference(model, batch, None, difference)
    for target in (
        gmarpp.Contrast(TARGET, 3),
        difference,
        lambda logits: (logits[[0, 1, 2], TARGET] - logits[:, 3]).exp().log(),
    ):
        found = gmarpp.explain(model, batch, BOTH, target)
        assert_equals_the_reference(found.maps, run, shares(17, [0]), 1)
        torch.testing.assert_close(found.scores, run.score.float())


def test_the_logit_of_a_single_class_is_explained_as_it_is():
    model, batch = vit(num_classes=1), images()
    run = reference(model, batch, None, lambda logits: logits[:, 0])
    found = gmarpp.explain(model, batch, BOTH)
    assert_equals_the_reference(found.maps, run, shares(17, [0]), 1)


def test_an_attention_pool_hands_its_row_to_the_balanced_rollout():
    model, batch, target = timm_network("vit_base_patch16_siglip_224"), images(2), torch.tensor([2, 5])
    found = gmarpp.explain(model, batch, BOTH, target).maps
    run = balanced_run(model, batch, margin_of(target), model.blocks)
    pool, gradient = run.attentions[-1], run.gradients[-1]
    assert pool.shape == (2, 3, 1, 16)
    expected = naive_token_relevance(run, 0).view(2, 4, 4)
    assert relative_error(found["token_relevance"], expected) < 1e-4
    for image in range(2):
        start = (gradient[image, :, 0].clamp(min=0) * pool[image, :, 0]).sum(0)
        expected = naive_balanced_rollout(run, start / start.sum(), image).view(4, 4)
        assert relative_error(found["gmarpp_balanced"][image], expected) < 1e-4


@pytest.mark.parametrize("quick_gelu", [True, False])
def test_open_clip_explains_a_function_of_its_features(quick_gelu):
    torch.manual_seed(0)
    vision = {"image_size": 32, "patch_size": 8, "width": 48, "head_width": 16, "layers": 3}
    text = {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1}
    clip = sharpened(open_clip.CLIP(embed_dim=24, vision_cfg=vision, text_cfg=text, quick_gelu=quick_gelu))
    prompt = F.normalize(torch.randn(24), dim=0)
    # Not by the function, for which the reference has a rule: a score's own gradient is plain.
    score = lambda features: (features / features.norm(dim=-1, keepdim=True)) @ prompt  # noqa: E731
    batch = images(2)
    found = gmarpp.explain(clip.visual, batch, BOTH, target=score)
    run = balanced_run(clip.visual, batch, score, clip.visual.transformer.resblocks)
    assert_equals_the_reference(found.maps, run, shares(17, [0]), 1)


def shares_of_biases(model, batch, score):
    """Give what the biases above each block's input say for the score of all images together, lowest block first."""
    model.requires_grad_(True)
    hooks = hold_by_class(model)
    with constants_held(share=0):
        total = score(model(batch)).sum()
        biases = {name: each for name, each in model.named_parameters() if name.endswith("bias")}
        found = torch.autograd.grad(total, list(biases.values()))
    for hook in hooks:
        hook.remove()
    by_name = {name: (each * g).sum() for (name, each), g in zip(biases.items(), found, strict=True)}
    blocks = range(len(model.blocks))
    is_above = lambda name, block: "blocks." not in name or int(name.split(".")[1]) >= block  # noqa: E731
    embedding = ("patch_embed", "pos_embed", "cls_token")
    by_name = {name: share for name, share in by_name.items() if not name.startswith(embedding)}
    return [sum(share for name, share in by_name.items() if is_above(name, block)) for block in blocks]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vit_tiny_patch16_224", {}),
        ("vit_tiny_patch16_224", {"global_pool": "avg", "init_values": 0.5}),
        ("eva02_tiny_patch14_224", {"mlp_ratio": 2}),
        ("vit_base_patch16_rpn_224", {}),
        ("vit_base_patch16_siglip_224", {}),
    ],
)
def test_relevance_and_biases_add_up_to_the_score_in_every_layer(name, options, monkeypatch):
    monkeypatch.setattr(balanced, "QUERY_KEY_SHARE", 0.0)
    seen = []
    monkeypatch.setattr(Relevance, "receive", lambda _, relevance: seen.append(relevance.sum()))
    model, batch, score = vit(name, **options), images(), logit_of(TARGET)
    for parameter in model.parameters():
        if parameter.dim() == 1 and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.2)
    found = gmarpp.explain(model, batch, "token_relevance", score)
    total = found.scores.sum()
    for relevance, of_biases in zip(reversed(seen), shares_of_biases(model, batch, score), strict=True):
        assert abs(of_biases) > 1e-3 * abs(total)
        torch.testing.assert_close(relevance + of_biases, total, rtol=1e-4, atol=1e-4)


class OwnProduct(Method):
    """Signed gradient times attention of all layers, of a balanced gradient, by matrices."""

    name, label, gradient_rule = "own", "Own", "balanced"

    def start(self, readout, images, tokens):
        return readout.new_zeros(len(readout), tokens)

    def step(self, row, layer):
        return row + layer.product.sum((1, 2))


@pytest.mark.parametrize("known_blocks", [True, False])
def test_methods_of_ones_own_take_the_balanced_gradient(known_blocks):
    model, batch = vit(), images()
    layout = gmarpp.architecture_of(model)
    if not known_blocks:
        layout = dataclasses.replace(layout, blocks=(), head=None)
    found = gmarpp.explain(model, batch, OwnProduct(), TARGET, architecture=layout).maps["own"]
    run = reference(model, batch, TARGET)
    expected = sum((a * g).sum((1, 2)) for a, g in zip(run.attentions, run.gradients, strict=True))
    assert relative_error(found, expected[:, 1:].view(3, 4, 4)) < 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_and_half_weights_agree_with_float32(dtype):
    model, batch = vit(), images()
    expected = gmarpp.explain(model, batch, BOTH, TARGET).maps
    with torch.autocast("cpu", dtype):
        autocast = gmarpp.explain(model, batch, BOTH, TARGET)
        assert torch.equal(autocast.logits, gmarpp.explain(model, batch, "rollout", TARGET).logits)
    half = gmarpp.explain(model.to(dtype), batch.to(dtype), BOTH, TARGET).maps
    for name, found in itertools.product(BOTH, (autocast.maps, half)):
        assert found[name].dtype == torch.float32
        assert torch.corrcoef(torch.stack((found[name].flatten(), expected[name].flatten())))[0, 1] > 0.98


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("fails", [False, True])
def test_nothing_of_the_rule_remains(recompute, fails):
    def score(logits):
        if fails:
            raise ZeroDivisionError
        return logits[:, 0]

    functions = {name: getattr(F, name) for name in ("layer_norm", "gelu", "scaled_dot_product_attention")}
    model, batch = vit(), images()
    expected = model(batch)
    gc.collect()
    gc.disable()
    try:
        with pytest.raises(ZeroDivisionError) if fails else contextlib.nullcontext():
            gmarpp.explain(model, batch, (*BOTH, *gmarpp.METHODS), score, recompute=recompute)
        if fails:
            gc.collect()  # of the traceback, which holds its frames
        assert not [each for each in gc.get_objects() if type(each) in (Descent, Entered)]
    finally:
        gc.enable()
    assert functions == {name: getattr(F, name) for name in functions}
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    assert not any("forward" in vars(each) or any(getattr(each, name) for name in hooks) for each in model.modules())
    assert torch.equal(model(batch), expected)


def test_a_head_that_reads_all_tokens_is_warned_of_once():
    way_down._warn_once.cache_clear()
    model, batch = vit(global_pool="avg"), images()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gmarpp.explain(model, batch, (*BOTH, "chefer", "legrad"))
        gmarpp.explain(vit(), batch, gmarpp.METHODS)
        gmarpp.explain(timm_network("vit_base_patch16_siglip_224"), batch, gmarpp.METHODS)
    with pytest.warns(UserWarning, match="random ones there: use gmarpp_balanced"):
        gmarpp.explain(model, batch, "gmarpp_l1")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gmarpp.explain(model, batch, ("rollout", "gmarpp_sum"))


@pytest.mark.parametrize("methods", [BOTH, (*BOTH, "gmarpp_l1")])
def test_every_module_gives_what_it_gives_without_the_rule(methods):
    model, batch, seen = timm_network("eva02_tiny_patch14_224", mlp_ratio=2), images(), []
    for module in model.modules():
        module.register_forward_hook(lambda _, args, output: seen.append(output.detach().clone()))
    gmarpp.explain(model, batch, "gmarpp_l1", TARGET)
    expected = seen[:]
    seen.clear()
    gmarpp.explain(model, batch, methods, TARGET)
    assert len(seen) == len(expected)
    assert all(torch.equal(*pair) for pair in zip(seen, expected, strict=True))


def test_other_threads_have_the_plain_gradient():
    model, other, batch = vit(), vit(seed=1), images()
    expected = torch.autograd.grad(other(batch)[:, 0].sum(), other.pos_embed)[0]
    runs, done = [], threading.Event()

    def train():
        while not done.is_set():
            runs.append(torch.autograd.grad(other(batch)[:, 0].sum(), other.pos_embed)[0])

    thread = threading.Thread(target=train)
    thread.start()
    try:
        while len(runs) < 5:
            gmarpp.explain(model, batch, BOTH, TARGET)
    finally:
        done.set()
        thread.join()
    assert all(relative_error(run, expected) < 1e-4 for run in runs)
