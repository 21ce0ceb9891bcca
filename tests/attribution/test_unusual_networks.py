"""Networks, threads and methods of one's own that could falsify a map: the map is right, or an error says why not."""

import threading

import pytest
import torch
from test_explain import images, relative_error, vit
from torch import nn

import gmarpp
from gmarpp.attribution import FunctionMethod, Method

BY_PATCH = gmarpp.Architecture(lambda height, width: (height // 8, width // 8), prefix_tokens=1)
TARGET = torch.tensor([1, 4, 2])


def test_threads_that_explain_one_network_take_turns():
    model, batch = vit(proj_drop_rate=0.5, drop_path_rate=0.3).train(), images()
    names = ["gmarpp_l1", "rollout", "token_relevance"]
    expected, found, failed = gmarpp.explain(model, batch, names, TARGET), [], []

    def explain_often():
        try:
            found.extend(gmarpp.explain(model, batch, names, TARGET) for _ in range(6))
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=explain_often) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert len(found) == 18
    for each in found:
        torch.testing.assert_close(each.logits, expected.logits)
        for name in names:
            assert relative_error(each.maps[name], expected.maps[name]) < 1e-5
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())


class Sum(nn.Module):
    def __init__(self, first, second):
        super().__init__()
        self.first, self.second = first, second

    def forward(self, batch):
        return self.first(batch) + self.second(batch.flip(3))


@pytest.mark.parametrize("methods", ["rollout", "attention", "gmarpp_l1"])
def test_two_networks_side_by_side_are_no_chain(methods):
    with pytest.raises(gmarpp.UnsupportedNetworkError, match=r"explain one of them|side by side|no gradient passes"):
        gmarpp.explain(Sum(vit(), vit()), images(), methods, TARGET, architecture=BY_PATCH)


class Masked(nn.Module):
    """One layer, in which some queries may attend to nothing."""

    def __init__(self, mask):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.qkv, self.head, self.mask = nn.Conv2d(3, 48, 8, 8), nn.Linear(48, 144), nn.Linear(48, 7), mask

    def forward(self, batch):
        tokens = self.embed(batch).flatten(2).mT
        query, key, value = self.qkv(tokens).unflatten(2, (3, 3, 16)).permute(2, 0, 3, 1, 4)
        attended = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=self.mask)
        return self.head((tokens + attended.transpose(1, 2).flatten(2)).mean(1))


@pytest.mark.parametrize("is_bool", [True, False])
def test_a_query_that_attends_to_nothing_keeps_its_relevance(is_bool):
    allowed = torch.ones(16, 16, dtype=torch.bool)
    allowed[3:9], allowed[0, 5:] = False, False
    model, batch = Masked(allowed if is_bool else torch.zeros(16, 16).masked_fill(~allowed, float("-inf"))), images()
    layout = gmarpp.Architecture(BY_PATCH.grid, prefix_tokens=0)
    found = gmarpp.explain(model, batch, ["rollout", "gmar_l1"], TARGET, architecture=layout).maps
    tokens = model.embed(batch).flatten(2).mT
    query, key, _ = model.qkv(tokens).unflatten(2, (3, 3, 16)).permute(2, 0, 3, 1, 4)
    attention = (query @ key.mT / 4).masked_fill(~allowed, float("-inf")).softmax(-1).nan_to_num(0)
    matrix = attention.mean(1) + torch.eye(16)
    expected = (matrix / matrix.sum(-1, keepdim=True)).mean(1).view(3, 4, 4)
    assert relative_error(found["rollout"], expected) < 1e-5
    torch.testing.assert_close(found["gmar_l1"].sum((1, 2)), torch.ones(3))


class Clamping(Method):
    name = label = "clamping"

    def step(self, row, layer):
        return row + (row[:, None] @ (layer.gradient.clamp_(min=0) * layer.attention).sum(1))[:, 0]


class Short(Method):
    name = label = "short"

    def step(self, row, layer):
        return layer.attention.mean((1, 2))[:, :5]


class Broadcast(Method):
    name = label = "broadcast"

    def step(self, row, layer):
        return row[:, :1]


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (Clamping(), r"clamping: changed the matrices of layer 3 in place"),
        (Short(), r"short: expected rows of shape \(3, 17\) below layer 3, got \(3, 5\)"),
        (Broadcast(), r"broadcast: expected rows of shape \(3, 17\) below layer 3, got \(3, 1\)"),
    ],
)
@pytest.mark.parametrize("others", [[], ["gmarpp_l1"]])
def test_methods_of_ones_own_that_would_falsify_maps_are_named(method, message, others):
    with pytest.raises(ValueError, match=message):
        gmarpp.explain(vit(), images(), [*others, method], TARGET)


def test_a_method_that_changes_the_networks_modes_changes_no_other():
    def trains(model, batch, target):
        model.train().requires_grad_(True)
        return batch

    def gradient(model, batch, target):
        (found,) = torch.autograd.grad(model(batch).gather(1, target[:, None]).sum(), batch)
        return found * batch

    model = vit(proj_drop_rate=0.5).requires_grad_(False)
    alone = gmarpp.explain(model, images(), FunctionMethod("gradient", gradient), TARGET).maps["gradient"]
    both = [FunctionMethod("trains", trains), FunctionMethod("gradient", gradient)]
    torch.testing.assert_close(gmarpp.explain(model, images(), both, TARGET).maps["gradient"], alone)
    assert not any(module.training for module in model.modules())
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_a_method_may_explain_its_network_after_changing_its_mode():
    def explains(model, batch, target):
        return gmarpp.explain(model.train(), batch.detach(), "rollout", target).maps["rollout"]

    model = vit(proj_drop_rate=0.5, drop_path_rate=0.5)
    found = gmarpp.explain(model, images(), [FunctionMethod("explains", explains), "rollout"], TARGET).maps
    torch.testing.assert_close(found["explains"], found["rollout"])
    assert not model.training


def test_a_method_may_explain_another_network_in_a_thread_of_its_own():
    def explains(model, batch, target):
        found = []
        other = threading.Thread(target=lambda: found.append(gmarpp.explain(vit(seed=1), images(), "rollout")))
        other.start()
        other.join(60)
        return found[0].maps["rollout"]

    found = gmarpp.explain(vit(), images(), FunctionMethod("explains", explains), TARGET).maps["explains"]
    torch.testing.assert_close(found, gmarpp.explain(vit(seed=1), images(), "rollout").maps["rollout"])


class InInferenceMode(Method):
    name = label = "in_inference_mode"

    @torch.inference_mode()
    def step(self, row, layer):
        return (row[:, None] @ layer.attention.mean(1))[:, 0]


def test_a_method_may_compute_in_inference_mode():
    found = gmarpp.explain(vit(), images(), [InInferenceMode(), "gmarpp_l1"], TARGET).maps
    alone = gmarpp.explain(vit(), images(), "gmarpp_l1", TARGET).maps["gmarpp_l1"]
    torch.testing.assert_close(found["gmarpp_l1"], alone)
    assert found["in_inference_mode"].isfinite().all()


class InPlaceResidual(nn.Module):
    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, tokens):
        tokens = tokens * 1.0
        normed = tokens.sigmoid()
        normed += self.block.attn(self.block.norm1(tokens))
        return normed


class Listed(nn.Module):
    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, tokens):
        return [self.block(tokens)]


class First(nn.Module):
    def forward(self, tokens):
        return tokens[0]


def replaced(wrap, after=None):
    model = vit()
    model.blocks[3] = wrap(model.blocks[3])
    if after is not None:
        model.norm = nn.Sequential(after, model.norm)
    return model


def shared():
    model = vit()
    model.blocks[1] = model.blocks[0]
    return model


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: replaced(InPlaceResidual), r"changes a tensor in place .*: write x = x \+ y"),
        (lambda: replaced(Listed, First()), r"a block returns a list, expected its tokens"),
        (shared, r"the same module is several of the network's blocks"),
    ],
)
def test_what_cannot_be_followed_is_named(make, message):
    model = make()
    model(images())
    with pytest.raises(gmarpp.UnsupportedNetworkError, match=message):
        gmarpp.explain(model, images(), ["gmarpp_l1"], TARGET)


def test_backward_hooks_of_the_users_change_nothing():
    names = ["token_relevance", "gmarpp_balanced", "gmarpp_l1"]
    expected = gmarpp.explain(vit(), images(), names, TARGET).maps
    model = vit()
    model.blocks[1].register_full_backward_hook(lambda *_: None)
    found = gmarpp.explain(model, images(), names, TARGET).maps
    for name in names:
        assert relative_error(found[name], expected[name]) < 1e-5


def test_names_of_classes_in_any_form():
    model = vit()
    model.class_names = None
    assert gmarpp.explain(model, images(), "rollout", 3).target.tolist() == [3] * 3
    model.class_names = {3: "dog", 0: "ant", 1: "bee", 2: "cat"}
    assert gmarpp.explain(model, images(), "rollout", "dog").target.tolist() == [3] * 3


@pytest.mark.parametrize("target", [gmarpp.Contrast(gmarpp.Contrast(0, 1), 2), {1, 2}, []])
def test_targets_that_are_none_are_named(target):
    with pytest.raises(ValueError, match="targets: expected"):
        gmarpp.explain(vit(), images(), "rollout", target)
