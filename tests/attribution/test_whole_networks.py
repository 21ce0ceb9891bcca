"""Maps are of the network that runs, whatever the architecture says of it; else an error says so."""

import dataclasses
import threading
from itertools import cycle

import pytest
import timm
import torch
import torch.nn.functional as F
import transformers
from naive_attribution import attention_and_gradients, naive_legrad, naive_row
from test_explain import images, logit_of, relative_error, vit
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

import gmarpp

GRADIENT_METHODS = ("gmarpp_l1", "gmarpp_l2", "gmarpp_sum", "gmar_l1", "gmar_l2", "chefer")
FREE_METHODS = ("rollout", "attention")
PRODUCTS = GRADIENT_METHODS + FREE_METHODS
TARGET = torch.tensor([1, 4, 2])
BY_PATCH = {"grid": lambda height, width: (height // 8, width // 8), "prefix_tokens": 1}


def assert_maps_are_the_naive_ones(model, batch, found, score, readout=(0,), prefix=1, layers=None):
    """Compare all products with the naive reference, which runs the network as it is."""
    attentions, gradients = (each[:layers] for each in attention_and_gradients(model, batch, score))
    row = torch.zeros(attentions[0].shape[-1])
    row[list(readout)] = 1 / len(readout)
    for name in set(PRODUCTS) & set(found):
        for image in range(len(batch)):
            expected = naive_row(name, attentions, gradients, row, image)[prefix:].reshape(4, 4)
            assert relative_error(found[name][image], expected) < 1e-4, name


class OwnHead(nn.Module):
    """What people put behind a backbone; each takes tokens (B, N, D) behind the final norm."""

    def __init__(self, kind):
        super().__init__()
        self.vit, self.kind = vit(num_classes=0), kind
        torch.manual_seed(3)
        self.fc = nn.Linear(96 if kind == "class and mean token" else 48, 7)
        self.order = torch.randperm(7)

    def head(self, tokens):
        tokens = self.vit.norm(tokens)
        if self.kind == "class and mean token":
            return self.fc(torch.cat((tokens[:, 0], tokens[:, 1:].mean(1)), dim=1))
        logits = self.fc(tokens[:, 0])
        if self.kind == "permuted classes":
            return logits[:, self.order]
        if self.kind == "projection":
            return F.normalize(logits, dim=-1)
        if self.kind == "tuple":
            return logits, tokens
        return {"out": logits} if self.kind == "dict" else logits

    def forward(self, batch):
        tokens = self.vit._pos_embed(self.vit.patch_embed(batch))
        return self.head(self.vit.blocks(tokens))

    def score(self):
        take = {"tuple": lambda output: output[0], "dict": lambda output: output["out"]}.get(self.kind, lambda x: x)
        return lambda output: logit_of(TARGET)(take(output))


@pytest.mark.parametrize(
    "kind", ["classifier", "class and mean token", "permuted classes", "projection", "tuple", "dict"]
)
def test_a_head_of_ones_own_is_explained_as_it_is(kind):
    model, batch = OwnHead(kind), images()
    score = model.score()
    target = score if kind in ("tuple", "dict") else TARGET
    backbone = gmarpp.architecture_of(model.vit)
    read = range(17) if kind == "class and mean token" else [0]
    found = gmarpp.explain(model, batch, PRODUCTS, target, architecture=backbone).maps
    assert_maps_are_the_naive_ones(model, batch, found, score, read)

    expected = naive_legrad(model, batch, model.vit.blocks, model.head, score)[:, 1:].reshape(3, 4, 4)
    # A head that is described wrongly, as the backbone's is here, gives way to what the network does.
    for layout in (backbone, dataclasses.replace(backbone, head=model.head), None):
        for methods in ("legrad", ["legrad", "gmarpp_l1"]):
            legrad = gmarpp.explain(model, batch, methods, target, architecture=layout).maps["legrad"]
            assert relative_error(legrad, expected) < 1e-4


class Changed(timm.models.VisionTransformer):
    """A network that looks like timm's, and makes something else of its tokens."""

    def forward(self, batch):
        tokens = self.norm(self.forward_features(batch))
        return self.head(tokens[:, 0] + 0.5 * tokens[:, 1:].mean(1))


@pytest.mark.parametrize("change", ["forward of a subclass", "forward of the instance", "forward hook"])
def test_a_known_family_that_forwards_otherwise_is_run_as_it_is(change):
    model, batch, read = vit(), images(), [0]
    if change == "forward of a subclass":
        model.__class__, read = Changed, range(17)
    elif change == "forward of the instance":
        forward = model.forward
        model.forward = lambda batch: forward(batch).flip(1)
    else:
        model.register_forward_hook(lambda _, args, output: output.flip(1))
    found = gmarpp.explain(model, batch, PRODUCTS, TARGET)
    torch.testing.assert_close(found.logits, model(batch).detach())
    assert_maps_are_the_naive_ones(model, batch, found.maps, logit_of(TARGET), read)

    def head(tokens):
        tokens = model.norm(tokens)
        if change == "forward of a subclass":
            return model.head(tokens[:, 0] + 0.5 * tokens[:, 1:].mean(1))
        return model.forward_head(tokens).flip(1)

    expected = naive_legrad(model, batch, model.blocks, head, logit_of(TARGET))[:, 1:].reshape(3, 4, 4)
    assert relative_error(gmarpp.explain(model, batch, "legrad", TARGET).maps["legrad"], expected) < 1e-4


class Mixer(nn.Module):
    """An MLP in which tokens meet, by a neighbor, by their mean, or by a convolution over the patch grid."""

    def __init__(self, mlp, kind):
        super().__init__()
        self.mlp, self.kind = mlp, kind
        self.conv = nn.Conv2d(48, 48, 3, padding=1, groups=48)

    def forward(self, tokens):
        if self.kind == "neighbor":
            return self.mlp(tokens + tokens.roll(1, 1))
        if self.kind == "mean":
            return self.mlp(tokens - tokens.mean(1, keepdim=True))
        grid = tokens[:, 1:].transpose(1, 2).unflatten(2, (4, 4))
        return self.mlp(torch.cat((tokens[:, :1] + grid.mean((2, 3))[:, None], self.conv(grid).flatten(2).mT), dim=1))


@pytest.mark.parametrize("kind", ["neighbor", "mean", "convolution", "hook"])
@pytest.mark.parametrize("where", [-1, 1])
def test_blocks_whose_tokens_mix_outside_attention_run_whole(kind, where):
    model, batch = vit(), images()
    block = model.blocks[where]
    if kind == "hook":
        block.mlp.register_forward_pre_hook(lambda _, args: (args[0] + args[0].roll(1, 1),))
    else:
        block.mlp = Mixer(block.mlp, kind)
    found = gmarpp.explain(model, batch, (*PRODUCTS, "legrad"), TARGET)
    torch.testing.assert_close(found.logits, model(batch).detach())
    assert_maps_are_the_naive_ones(model, batch, found.maps, logit_of(TARGET))
    head = lambda tokens: model.forward_head(model.norm(tokens))  # noqa: E731
    expected = naive_legrad(model, batch, model.blocks, head, logit_of(TARGET))[:, 1:].reshape(3, 4, 4)
    for methods in ("legrad", ["legrad", "gmarpp_l1"]):
        for recompute in (False, True):
            legrad = gmarpp.explain(model, batch, methods, TARGET, recompute=recompute).maps["legrad"]
            assert relative_error(legrad, expected) < 1e-4


@pytest.mark.parametrize("methods", ["gmarpp_l1", "legrad", ["gmarpp_l1", "legrad"]])
def test_hooks_see_the_network_as_it_runs(methods):
    model, batch = vit(), images()
    seen = []
    for name, module in model.named_modules():
        module.register_forward_hook(lambda _, args, output, name=name: seen.append((name, output.detach().clone())))
    model(batch)
    expected = seen[:]
    seen.clear()
    gmarpp.explain(model, batch, methods)
    if "legrad" in methods:  # which asks the head for every layer's score
        seen, expected = ([each for each in every if "blocks." in each[0]] for every in (seen, expected))
    assert [name for name, _ in seen] == [name for name, _ in expected]
    for (_, found), (_, plain) in zip(seen, expected, strict=True):
        torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-5)


class Operations(TorchDispatchMode):
    """Counts the floating-point operations of products of matrices, convolutions and fused attention."""

    def __init__(self):
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function._overloadpacket in flop_registry:
            self.total += flop_registry[function._overloadpacket](*args, **(kwargs or {}), out_val=result)
        return result


def flops(model, methods, **options):
    with Operations() as counted:
        gmarpp.explain(model, images(3), methods, **options)
    return counted.total


def test_legrad_costs_little_where_the_head_reads_a_class_token():
    model = vit(depth=2, mlp_ratio=8)
    whole = flops(model, "gmarpp_l1")
    # The layers' own scores need the tails of the class token alone, and no gradient from block to block.
    assert flops(model, ["gmarpp_l1", "legrad"]) < 1.2 * whole
    assert flops(model, "legrad") < 0.7 * whole


class Sum(nn.Module):
    def __init__(self, first, second):
        super().__init__()
        self.first, self.second = first, second

    def forward(self, batch):
        return self.first(batch) + self.second(batch)


@pytest.mark.parametrize("described", ["first", "second"])
def test_attention_outside_the_known_blocks_is_an_error(described):
    model = Sum(vit(), vit(seed=1))
    layout = gmarpp.architecture_of(getattr(model, described))
    for methods in ("gmarpp_l1", "rollout"):
        with pytest.raises(
            gmarpp.UnsupportedNetworkError, match="4 of 8 attention calls were made outside the 4 known"
        ):
            gmarpp.explain(model, images(), methods, architecture=layout)


class Pooled(nn.Module):
    """A backbone under a pool of its own."""

    def __init__(self, pool, **options):
        super().__init__()
        self.vit, self.pool = vit(class_token=False, global_pool="avg", **options), pool

    def forward(self, batch):
        return self.vit.head(self.pool(self.vit.norm(self.vit.blocks(self.tokens(batch)))))

    def tokens(self, batch):
        return self.vit._pos_embed(self.vit.patch_embed(batch))


class LatentPool(nn.Module):
    """Attention of learned queries, as many as there are tokens."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(5)
        self.query = nn.Parameter(torch.randn(1, 3, 16, 16))
        self.key, self.value = nn.Linear(48, 48), nn.Linear(48, 48)

    def forward(self, tokens):
        key, value = (each(tokens).unflatten(2, (3, 16)).transpose(1, 2) for each in (self.key, self.value))
        pooled = F.scaled_dot_product_attention(self.query.expand(len(tokens), -1, -1, -1), key, value)
        return pooled[:, :, 0].flatten(1)


@pytest.mark.parametrize("blocks", [True, False])
def test_a_pool_with_as_many_queries_as_tokens_has_no_residual(blocks):
    model, batch = Pooled(LatentPool()), images()
    layout = gmarpp.architecture_of(model.vit)
    if not blocks:
        layout = dataclasses.replace(layout, blocks=(), head=None)
    for methods in (FREE_METHODS, (*FREE_METHODS, "chefer")):
        found = gmarpp.explain(model, batch, methods, TARGET, architecture=layout).maps
        (*attentions, pool), (*gradients, pool_gradient) = attention_and_gradients(model, batch, logit_of(TARGET))
        starts = {"rollout": pool[:, :, 0].mean(1), "chefer": (pool * pool_gradient)[:, :, 0].relu().mean(1)}
        for image in range(3):
            for name in set(starts) & set(found):
                expected = naive_row(name, attentions, gradients, starts[name][image], image).reshape(4, 4)
                assert relative_error(found[name][image], expected) < 1e-4, name
            assert relative_error(found["attention"][image].flatten(), pool[image, :, 0].mean(0)) < 1e-4


class WeightsPool(nn.Module):
    """Attention that never reaches the fused call: weights used, or a softmax by hand."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.attention = kind, nn.MultiheadAttention(48, 3, batch_first=True)
        self.query, self.gate = nn.Parameter(torch.randn(1, 1, 48)), nn.Linear(48, 1)

    def forward(self, tokens):
        if self.kind == "weights":
            weights = self.attention(self.query.expand(len(tokens), -1, -1), tokens, tokens)[1]
            return (weights @ tokens)[:, 0]
        weights = self.gate(tokens).softmax(1)
        return (weights * tokens).sum(1)


@pytest.mark.parametrize(("kind", "message"), [("weights", "need_weights=True"), ("gate", "softmax over 16 tokens")])
@pytest.mark.parametrize("methods", ["attention", "gmarpp_l1"])
def test_attention_that_is_not_seen_is_an_error(kind, message, methods):
    model = Pooled(WeightsPool(kind))
    layout = dataclasses.replace(gmarpp.architecture_of(model.vit), blocks=(), head=None)
    for described in (layout, gmarpp.architecture_of(model.vit)):
        with pytest.raises(gmarpp.UnsupportedNetworkError, match=message):
            gmarpp.explain(model, images(), methods, architecture=described)


def hugging_face(name, **options):
    config = getattr(transformers, name).config_class(
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=96,
        patch_size=8,
        attn_implementation="sdpa",
        **options,
    )
    torch.manual_seed(0)
    return getattr(transformers, name)(config).eval()


def test_networks_of_another_kind_are_named():
    layout = gmarpp.Architecture(**BY_PATCH)
    cases = (
        (vit(attn_layer="diff"), None, None, "calls attention several times"),
        (
            hugging_face("ViTMAEModel", image_size=32, mask_ratio=0.0),
            lambda output: output.last_hidden_state[:, 0, 0],
            layout,
            r"shuffle or mask patches do \(ViTMAE\)",
        ),
    )
    for model, target, described, message in cases:
        for methods in ("rollout", gmarpp.METHODS[:5]):
            with pytest.raises(gmarpp.UnsupportedNetworkError, match=message):
                gmarpp.explain(model, images(), methods, target, architecture=described)


@pytest.mark.parametrize("same", [True, False])
def test_other_threads_run_their_networks_untouched(same):
    model, batch = vit(), images()
    other, theirs = model if same else vit(seed=1, global_pool="avg"), images(5, seed=7)
    expected = other(theirs).detach()
    maps = gmarpp.explain(model, batch, gmarpp.METHODS, TARGET).maps
    done, errors, runs, explained = threading.Event(), [], [], 0

    def run():
        try:
            while not done.is_set():
                with torch.no_grad():
                    runs.append((other(theirs) - expected).abs().max().item())
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        for options in cycle([{}, {"recompute": True}]):
            found = gmarpp.explain(model, batch, gmarpp.METHODS, TARGET, **options).maps
            assert all(relative_error(found[name], maps[name]) < 1e-5 for name in maps)
            explained += 1
            if errors or (explained >= 8 and len(runs) > 10):
                break
    finally:
        done.set()
        thread.join()
    assert not errors
    assert max(runs) < 1e-4 * expected.abs().max()


def gated(model, threshold):
    """Let a head read patch tokens beside the class token where there is much in them."""

    def forward_head(tokens, pre_logits=False):
        size = tokens[:, 1:].abs().sum((1, 2)) / (16 * tokens.shape[2])
        return model.head(tokens[:, 0] + torch.relu(size - threshold)[:, None] * torch.linspace(-1, 1, tokens.shape[2]))

    model.forward_head = forward_head
    return model


@pytest.mark.parametrize("position", [0, 2])
def test_a_head_that_reads_the_patches_of_some_images_has_them_in_its_scores(position):
    model, batch = vit(depth=3), images(3)
    sizes = model.forward_features(batch)[:, 1:].abs().mean((1, 2)).detach()
    order = sizes.argsort().tolist()
    others = list(order[:-1])
    batch = batch[[order[-1], *others] if position == 0 else [*others, order[-1]]]
    model = gated(model, float(sizes.sort().values[-2:].mean()))
    layout = dataclasses.replace(gmarpp.architecture_of(model), head=None)
    found = gmarpp.explain(model, batch, "legrad", 0).maps["legrad"]
    # Without tails for the prefix tokens alone, all of the graph is differentiated.
    model.blocks[0].register_forward_hook(lambda *_: None)
    expected = gmarpp.explain(model, batch, "legrad", 0, architecture=layout).maps["legrad"]
    assert relative_error(found, expected) < 1e-5
