"""Attention that a network writes out, and class attention, against naive N x N matrices."""

import itertools
import warnings

import pytest
import timm
import torch
import transformers
from naive_attribution import attention_and_gradients, layer_matrix
from naive_balanced import balanced_run, margin_of, shared
from test_families import images, relative_error, sharpened, timm_network
from timm.models.volo import VOLO
from torch import nn
from torch.nn.attention.flex_attention import flex_attention
from torch.overrides import _get_current_function_mode_stack

import gmarpp
from gmarpp.attribution.call import warn_of_memory

SIGNED = ("gmarpp_l1", "gmarpp_l2", "gmarpp_sum", "chefer")
BLIND = ("gmar_l1", "gmar_l2", "rollout", "attention")
ALL = gmarpp.METHODS + gmarpp.VARIANTS
TARGET = torch.tensor([2, 5])
SMALL = {"img_size": 32, "num_heads": 3, "num_classes": 7}


def logit(output):
    return output.gather(1, TARGET[:, None])[:, 0]


def network(name, **options):
    torch.manual_seed(0)
    model = timm.create_model(name, **(SMALL | options))
    nn.init.normal_(model.cls_token)
    return sharpened(model)


def cait():
    return network("cait_xxs24_224", patch_size=8, depth=3, embed_dim=48, init_values=1.0)


def convit():
    return network("convit_tiny", patch_size=8, depth=4, embed_dim=16, local_up_to_layer=2)


def xcit():
    return network("xcit_nano_12_p8_224", depth=2, embed_dim=48, num_heads=2, eta=1.0)


def volo():
    torch.manual_seed(0)
    sizes = {"layers": [1, 2, 1, 1], "embed_dims": [24, 48, 48, 48], "num_heads": [2, 3, 3, 3], "stem_hidden_dim": 16}
    return sharpened(VOLO(**sizes, img_size=64, num_classes=7, use_aux_head=False))


def attentions_of_volo(model):
    blocks = [block for stage in model.network[2:] for block in stage]
    return [block.attn for block in (*blocks, *model.post_network)]


# network, modules that are handed its attention, and whether some of it is negative
NETWORKS = {
    "CaiT": (cait, lambda model: [block.attn for block in (*model.blocks, *model.blocks_token_only)], True),
    "ConViT": (convit, lambda model: [block.attn for block in model.blocks], False),
    "XCiT": (xcit, lambda model: [block.attn for block in model.cls_attn_blocks], False),
    "VOLO": (volo, attentions_of_volo, False),
}


def images_of(name):
    return images((64, 64) if name == "VOLO" else (32, 32))


def matrices_and_gradients(model, attentions, batch, score):
    """Give A and G of each layer, (B, H, N, N) of all tokens that a layer attends to, lowest layer first."""
    collected, hooks = [], []
    for attention in attentions:
        attention.fused_attn = False
        hooks.append(attention.attn_drop.register_forward_hook(lambda _, args, output: collected.append(output)))
    gradients = torch.autograd.grad(score(model(batch.clone().requires_grad_())).sum(), collected)
    for attention, hook in zip(attentions, hooks, strict=True):
        attention.fused_attn = True
        hook.remove()
    return [[of_all_tokens(each.detach()) for each in every] for every in (collected, gradients)]


def of_all_tokens(matrices):
    """Add rows of zeros for the patch tokens where the class token alone attends."""
    whole = torch.zeros(*matrices.shape[:2], matrices.shape[3], matrices.shape[3])
    whole[:, :, : matrices.shape[2]] = matrices
    return whole


def matrix_of(name, attention, gradient):
    """Give M of one image, (N, N); where attention is negative, its products with the gradient are what is positive."""
    if name not in SIGNED or bool((attention >= 0).all()):
        return layer_matrix(name, attention, gradient)
    products, norms = (gradient * attention).clamp(min=0), gradient.clamp(min=0).flatten(1)
    if name == "chefer":
        return torch.eye(len(attention[0])) + products.mean(0)
    weights = torch.ones(len(norms)) if name == "gmarpp_sum" else norms.norm(p=int(name[-1]), dim=1)
    weights = weights if name == "gmarpp_sum" else weights / weights.sum()
    matrix = torch.eye(len(attention[0])) + sum(weight * each for weight, each in zip(weights, products, strict=True))
    return matrix / matrix.sum(1, keepdim=True)


def naive_row(name, attentions, gradients):
    """Give the relevance of the patch tokens, (N,), that the class token hands down through all layers."""
    row = torch.eye(attentions[-1].shape[-1])[0]
    if name == "attention":
        row, attentions = row @ attentions[-1].mean(0), []
    for attention, gradient in reversed(list(zip(attentions, gradients, strict=False))):
        # Tokens that are not in a layer yet are the first ones.
        row = row[len(row) - attention.shape[-1] :]
        row = row @ matrix_of(name, attention, gradient)
    return row[-16:]


@pytest.mark.parametrize("name", NETWORKS)
def test_maps_are_those_of_explicit_matrices(name):
    make, attentions_of, is_signed = NETWORKS[name]
    model, batch = make(), images_of(name)
    methods = SIGNED if is_signed else SIGNED + BLIND
    attentions, gradients = matrices_and_gradients(model, attentions_of(model), batch, logit)
    assert any(bool((each < 0).any()) for each in attentions) == is_signed
    for recompute in (False, True):
        found = gmarpp.explain(model, batch, methods, TARGET, recompute=recompute)
        torch.testing.assert_close(found.logits, model(batch).detach(), rtol=1e-4, atol=1e-4)
        for method, image in itertools.product(methods, range(2)):
            layers = [[each[image] for each in every] for every in (attentions, gradients)]
            expected = naive_row(method, *layers).view(4, 4)
            assert relative_error(found.maps[method][image], expected) < 1e-4, method
    if is_signed:
        for methods in (BLIND, "rollout"):
            with pytest.raises(
                gmarpp.UnsupportedNetworkError, match=r"is negative.*rollout.* would take it for shares"
            ):
                gmarpp.explain(model, batch, methods)
    else:
        alone = gmarpp.explain(model, batch, ("rollout", "attention"), TARGET).maps
        assert all(relative_error(alone[method], found.maps[method]) < 1e-5 for method in alone)


@pytest.mark.parametrize("name", ["CaiT", "ConViT"])
def test_a_changed_cell_changes_its_token_most(name):
    model, batch, entered = NETWORKS[name][0](), images(batch=1), []
    model.blocks[0].register_forward_pre_hook(lambda _, args: entered.append(args[0]))
    changed = batch.clone()
    changed[:, :, 24:, 8:16] += 1
    model(batch), model(changed)
    assert (entered[1] - entered[0]).abs().sum((0, 2)).argmax() == 13


def test_legrad_asks_class_attention_for_the_score_of_every_block():
    model, batch = cait(), images()
    expected = 0
    for depth in range(1, 4):
        blocks, model.blocks = model.blocks, model.blocks[:depth]
        attentions = [block.attn for block in (*model.blocks, *model.blocks_token_only)]
        _, gradients = matrices_and_gradients(model, attentions, batch, logit)
        expected = expected + gradients[depth - 1].clamp(min=0).mean((1, 2)).view(2, 4, 4) / 3
        model.blocks = blocks
    for methods in ("legrad", ("legrad", "gmarpp_l1")):
        assert relative_error(gmarpp.explain(model, batch, methods, TARGET).maps["legrad"], expected) < 1e-4


class ReadsPatches(nn.Module):
    """A CaiT whose classifier reads the mean of the patch tokens beside the class token."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, batch):
        tokens = self.network.forward_features(batch)
        return self.network.head(tokens[:, 0] + tokens[:, 1:].mean(dim=1))


def test_a_score_that_reads_patches_beside_class_attention_is_refused():
    with pytest.raises(gmarpp.UnsupportedNetworkError, match="reads patch tokens that leave the last block directly"):
        gmarpp.explain(ReadsPatches(cait()), images(), "gmarpp_l1", TARGET)


def test_legrad_of_layers_in_which_the_class_token_alone_attends():
    model, batch = xcit(), images()
    expected = 0
    for depth in (1, 2):
        blocks, model.cls_attn_blocks = model.cls_attn_blocks, model.cls_attn_blocks[:depth]
        _, gradients = matrices_and_gradients(model, [b.attn for b in model.cls_attn_blocks], batch, logit)
        expected = expected + gradients[-1].clamp(min=0).mean((1, 2))[:, 1:].view(2, 4, 4) / 2
        model.cls_attn_blocks = blocks
    for methods in ("legrad", ("legrad", "gmarpp_l1")):
        assert relative_error(gmarpp.explain(model, batch, methods, TARGET).maps["legrad"], expected) < 1e-4


def test_where_the_class_token_is_missing_methods_that_need_it_are_named():
    with pytest.raises(gmarpp.UnsupportedNetworkError, match=r"legrad: .* below block 2 have no class token"):
        gmarpp.explain(convit(), images(), "legrad")
    with pytest.raises(gmarpp.UnsupportedNetworkError, match="gmarpp_balanced: what the class token keeps"):
        gmarpp.explain(cait(), images(), "gmarpp_balanced")


def balanced_reference(model, attentions, batch):
    """Give what the balanced methods are made of; a quarter of the gradient of attention goes on."""
    collected, hooks = [], []

    def share(_, args, output):
        collected.append(shared(output, 0.25))
        return collected[-1]

    for attention in attentions:
        attention.fused_attn = False
        hooks.append(attention.attn_drop.register_forward_hook(share))
    run = balanced_run(model, batch, margin_of(TARGET), gmarpp.architecture_of(model).blocks, written=collected)
    for attention, hook in zip(attentions, hooks, strict=True):
        attention.fused_attn = True
        hook.remove()
    return run


@pytest.mark.parametrize("name", NETWORKS)
def test_token_relevance_is_that_of_the_patch_tokens_of_all_blocks(name):
    make, attentions_of, _ = NETWORKS[name]
    model, batch, expected = make(), images_of(name), 0
    run = balanced_reference(model, attentions_of(model), batch)
    for x, dx in zip(run.x, run.dx, strict=True):
        relevance = (x * dx).sum(-1).flatten(1)[:, -16:]
        expected = expected + relevance / relevance.abs().sum(1, keepdim=True)
    for methods in ("token_relevance", ("token_relevance", "gmarpp_l1")):
        found = gmarpp.explain(model, batch, methods, TARGET).maps["token_relevance"]
        assert relative_error(found, expected.view(2, 4, 4)) < 1e-4


def test_the_balanced_rollout_goes_on_without_the_class_token():
    model, batch = convit(), images()
    run = balanced_reference(model, [block.attn for block in model.blocks], batch)
    found = gmarpp.explain(model, batch, "gmarpp_balanced", TARGET).maps["gmarpp_balanced"]
    for image in range(2):
        row, total = torch.eye(17)[0], 0
        for x, dm, attention, gradient in reversed(
            list(zip(run.x, run.dm, run.attentions, run.gradients, strict=True))
        ):
            row = row[-x.shape[1] :]
            matrix = (gradient[image].clamp(min=0) * attention[image]).sum(0)
            matrix = matrix + torch.diag((x * dm).sum(-1)[image].clamp(min=0))
            empty = matrix.sum(1) == 0
            matrix[empty] = torch.eye(len(matrix))[empty]
            row = row @ (matrix / matrix.sum(1, keepdim=True))
            total = total + row[-16:]
        assert relative_error(found[image], total.view(4, 4)) < 1e-4


def test_an_attention_pool_explains_a_convolutional_network():
    torch.manual_seed(0)
    model = sharpened(timm.create_model("resnet50_clip", img_size=64, num_classes=7))
    batch = images((64, 64))
    (attention,), (gradient,) = attention_and_gradients(model, batch, logit)
    found = gmarpp.explain(model, batch, SIGNED + BLIND, TARGET)
    for method, image in itertools.product(found.maps, range(2)):
        row = torch.eye(5)[0]
        expected = row @ (
            attention[image].mean(0)
            if method == "attention"
            else layer_matrix(method, attention[image], gradient[image])
        )
        assert relative_error(found.maps[method][image], expected[1:].view(2, 2)) < 1e-4, method


def written_and_fused(kind):
    if kind == "transformers":
        config = transformers.ViTConfig(
            image_size=32, patch_size=8, hidden_size=48, intermediate_size=96, num_hidden_layers=3,
            num_attention_heads=3, num_labels=7,
        )  # fmt: skip
        model = sharpened(transformers.ViTForImageClassification(config))
        return model, lambda is_written: model.set_attn_implementation("eager" if is_written else "sdpa")
    model = timm_network("vit_tiny_patch16_224", **({"global_pool": "avg"} if kind == "average" else {}))

    def write(is_written):
        for block in model.blocks:
            block.attn.fused_attn = not is_written

    return model, write


@pytest.mark.parametrize("kind", ["class token", "average", "transformers"])
def test_written_out_or_fused_a_network_has_the_same_maps(kind):
    model, write = written_and_fused(kind)
    batch = images()
    for methods, recompute in itertools.product((ALL, "rollout", "legrad", "token_relevance"), (False, True)):
        write(False)
        expected = gmarpp.explain(model, batch, methods, TARGET, recompute=recompute).maps
        write(True)
        found = gmarpp.explain(model, batch, methods, TARGET, recompute=recompute).maps
        for method in expected:
            assert relative_error(found[method], expected[method]) < 1e-4, method


def by_exponentials(exponentials):
    def attend(query, key, value):
        weights = exponentials(query @ key.mT / 4)
        return weights / weights.sum(-1, keepdim=True) @ value

    return attend


CALLED = {
    "function": lambda *each: nn.functional.scaled_dot_product_attention(*each),
    # Imported by name, as from torch.nn.functional import scaled_dot_product_attention.
    "name": nn.functional.scaled_dot_product_attention,
    "operator": torch.ops.aten.scaled_dot_product_attention,
    "operator's overload": torch.ops.aten.scaled_dot_product_attention.default,
    "kernel": lambda *each: torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*each)[0],
    "flexible": flex_attention,
    "exponentials": by_exponentials(torch.exp),
    "exponentials in place": by_exponentials(lambda scores: scores.exp_()),
    "powers of two": by_exponentials(torch.exp2),
    "exponentials' operator": by_exponentials(torch.ops.aten.exp),
    "softmax's operator": lambda query, key, value: torch.ops.aten.softmax.int(query @ key.mT / 4, -1) @ value,
    "softmin": lambda query, key, value: nn.functional.softmin(query @ key.mT / -4, dim=-1) @ value,
    "private function": lambda *each: torch._scaled_dot_product_attention_math(*each)[0],
    "logarithms": lambda query, key, value: (query @ key.mT / 4).log_softmax(dim=-1).exp() @ value,
}


class ByHand(nn.Module):
    """A block that attends as code of one's own may do it."""

    def __init__(self, kind, beside=False):
        super().__init__()
        torch.manual_seed(3)
        self.beside = beside
        self.kind, self.heads = kind, 1 if kind == "one head" else 3
        self.norm, self.qkv, self.softmax = nn.LayerNorm(48), nn.Linear(48, 144), nn.Softmax(dim=-1)

    def forward(self, tokens):
        query, key, value = self.qkv(self.norm(tokens)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if self.kind == "one head":
            weights = self.softmax(torch.bmm(query[:, 0], key[:, 0].mT) / 48**0.5)
            return tokens + torch.bmm(weights, value[:, 0])
        if self.kind in CALLED:
            attended = CALLED[self.kind](query, key, value)
            if self.beside:
                attended = attended + CALLED["function"](query, key, value)
            return tokens + attended.transpose(1, 2).flatten(2)
        weights = self.softmax(query @ key.mT / 4)
        if self.kind == "einsum":
            attended = torch.einsum("b h i j, b h j d -> b h i d", weights, value)
        elif self.kind == "sharpened":
            weights = weights**2 / weights.square().sum(-1, keepdim=True)
            attended = torch.matmul(weights.to(value.dtype), value)
        else:
            attended = torch.matmul(weights, value)
        attended = attended.transpose(1, 2).flatten(2)
        if self.kind == "gate":
            attended = attended * weights.mean(1).sum(1)[..., None]
        if self.kind == "values first":
            attended = (value.mT @ weights.mT).mT.transpose(1, 2).flatten(2)
        return tokens + attended


def vit_with(kind, beside=False):
    model = timm_network("vit_tiny_patch16_224")
    model.blocks[1] = sharpened(ByHand(kind, beside))
    return model


@pytest.mark.parametrize("kind", ["product", "one head", "einsum", "sharpened"])
def test_attention_of_ones_own_is_followed(kind):
    model, batch, met = vit_with(kind), images(), []
    found = gmarpp.explain(model, batch, "rollout", TARGET).maps["rollout"]
    for block in (model.blocks[0], model.blocks[2]):
        block.attn.fused_attn = False
        block.attn.attn_drop.register_forward_hook(lambda _, args, output: met.append(output))

    def meet(_, args, output):
        met.append(output**2 / output.square().sum(-1, keepdim=True) if kind == "sharpened" else output)

    model.blocks[1].softmax.register_forward_hook(meet)
    with torch.no_grad():
        model(batch)
    for image in range(2):
        row = torch.eye(17)[0]
        for weights in reversed(met):
            matrix = (weights[image] if weights.dim() == 4 else weights[image][None]).mean(0)
            row = row @ ((matrix + torch.eye(17)) / 2)
        assert relative_error(found[image], row[1:].view(4, 4)) < 1e-4


@pytest.mark.parametrize("kind", ["name", "operator", "operator's overload"])
@pytest.mark.parametrize("methods", [ALL, ("rollout", "attention"), ("legrad", "random")], ids=len)
@pytest.mark.parametrize("recompute", [False, True])
def test_attention_is_followed_by_whatever_name_it_is_called(kind, methods, recompute):
    expected = gmarpp.explain(vit_with("function"), images(), methods, TARGET, recompute=recompute).maps
    found = gmarpp.explain(vit_with(kind), images(), methods, TARGET, recompute=recompute).maps
    for name in methods:
        assert relative_error(found[name], expected[name]) < 1e-5, name


@pytest.mark.parametrize("kind", sorted(CALLED.keys() - {"function", "name", "operator", "operator's overload"}))
@pytest.mark.parametrize("methods", ["gmarpp_l1", "rollout"])
def test_attention_in_other_forms_beside_fused_attention_is_refused(kind, methods):
    with pytest.raises(gmarpp.UnsupportedNetworkError, match=r"attends through|softmax over 17 tokens|FlexAttention"):
        gmarpp.explain(vit_with(kind, beside=True), images(), methods)


@pytest.mark.parametrize("methods", ["gmarpp_l1", "rollout"])
def test_exponentials_of_parameters_are_no_attention(methods):
    class Scaled(nn.Module):
        def __init__(self, block):
            super().__init__()
            self.block, self.logarithm = block, nn.Parameter(torch.zeros(1, 1, 17))

        def forward(self, tokens):
            return self.block(tokens) * self.logarithm.exp().mean()

    model, expected = timm_network("vit_tiny_patch16_224"), timm_network("vit_tiny_patch16_224")
    model.blocks[1] = Scaled(model.blocks[1])
    found = gmarpp.explain(model, images(), methods, TARGET).maps[methods]
    assert relative_error(found, gmarpp.explain(expected, images(), methods, TARGET).maps[methods]) < 1e-5


def test_attention_after_the_blocks_is_followed_by_whatever_name_it_is_called():
    class Pool(nn.Module):
        def __init__(self, kind):
            super().__init__()
            torch.manual_seed(0)
            self.network, self.attend = (
                timm_network("vit_tiny_patch16_224", num_classes=0, global_pool=""),
                CALLED[kind],
            )
            self.query, self.pairs, self.head = (
                nn.Parameter(torch.randn(1, 3, 1, 16)), nn.Linear(48, 96), nn.Linear(48, 7)
            )  # fmt: skip

        def forward(self, batch):
            key, value = 3 * self.pairs(self.network(batch)).unflatten(2, (2, 3, 16)).permute(2, 0, 3, 1, 4)
            attended = self.attend(self.query.expand(len(batch), -1, -1, -1), key, value)
            return self.head(attended.transpose(1, 2).reshape(len(batch), 48))

    methods = [name for name in ALL if name != "legrad"]
    expected = gmarpp.explain(Pool("function").eval(), images(), methods, TARGET).maps
    found = gmarpp.explain(Pool("name").eval(), images(), methods, TARGET).maps
    for name in methods:
        assert relative_error(found[name], expected[name]) < 1e-5, name


@pytest.mark.parametrize("kind", ["gate", "values first"])
@pytest.mark.parametrize("methods", ["gmarpp_l1", ("gmarpp_l1", "legrad")])
def test_weights_that_do_something_else_are_refused(kind, methods):
    with pytest.raises(gmarpp.UnsupportedNetworkError, match=r"softmax over 17 tokens|never calls"):
        gmarpp.explain(vit_with(kind), images(), methods)


def test_it_is_said_once_that_matrices_are_kept():
    model, write = written_and_fused("class token")
    write(True)
    warn_of_memory.cache_clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        gmarpp.explain(model, images())
        gmarpp.explain(model, images())
    assert sum("writes its attention out, N x N" in str(each.message) for each in caught) == 1


@pytest.mark.parametrize("breaks", [False, True])
def test_nothing_is_left_behind(breaks):
    model = convit()
    if breaks:
        model.head.register_forward_hook(lambda *_: 1 / 0)
    fused, forwards = nn.functional.scaled_dot_product_attention, [each.forward for each in model.modules()]
    if breaks:
        with pytest.raises(ZeroDivisionError):
            gmarpp.explain(model, images(), ALL[:3])
    else:
        gmarpp.explain(model, images(), ALL[:3])
    assert nn.functional.scaled_dot_product_attention is fused
    assert not _get_current_function_mode_stack()
    assert [each.forward for each in model.modules()] == forwards
