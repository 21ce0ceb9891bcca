"""The one known network inside a wrapper is found, and explained with whatever the wrapper does after it."""

import copy
import threading

import lightning
import pytest
import torch
import torch.distributed
import transformers
from naive_attribution import naive_legrad
from test_explain import images, relative_error, vit
from test_families import assert_equals_naive
from test_whole_networks import Operations
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

import gmarpp

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 4, "num_heads": 3}
TARGET = torch.tensor([1, 4, 2])


def logits_of(output):
    return getattr(output, "logits", output)


def score(output):
    return logits_of(output).gather(1, TARGET[:, None])[:, 0]


class Backbone(nn.Module):
    """A backbone with a head of one's own over tokens; also a projection that timm's head would not reproduce."""

    def __init__(self, read):
        super().__init__()
        self.read, self.backbone, self.fc = read, vit(num_classes=0), nn.Linear(48, 7)

    def head(self, tokens):
        tokens = self.backbone.norm(tokens)
        return self.fc(tokens[:, 0] if self.read == "class token" else tokens[:, 1:].amax(1))

    def forward(self, batch):
        tokens = self.backbone.forward_features(batch)
        return self.fc(tokens[:, 0] if self.read == "class token" else tokens[:, 1:].amax(1))


@pytest.mark.parametrize(("read", "tokens"), [("class token", [0]), ("maximum", None)])
def test_a_backbone_with_a_head_of_ones_own(read, tokens):
    torch.manual_seed(3)
    model, batch = Backbone(read), images()
    if tokens is not None:
        blocks, head = model.backbone.blocks, model.head
        assert_equals_naive(model, batch, TARGET, score, (4, 4), tokens, blocks, head, prefix=1)
    expected = naive_legrad(model, batch, model.backbone.blocks, model.head, score)[:, 1:].reshape(3, 4, 4)
    for methods in ("legrad", ["legrad", "gmarpp_l1"]):
        for recompute in (False, True):
            found = gmarpp.explain(model, batch, methods, TARGET, recompute=recompute).maps["legrad"]
            assert relative_error(found, expected) < 1e-4


class Convolutions(nn.Module):
    """One convolution before the blocks, which the next step changes in place, one used twice, and one in the head."""

    def __init__(self):
        super().__init__()
        self.vit = vit(num_classes=0, class_token=False, global_pool="avg")
        self.stem, self.twice = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 1)
        self.last, self.fc = nn.Conv2d(48, 48, 3, padding=1), nn.Linear(48, 7)

    def head(self, tokens):
        return self.fc(self.last(self.vit.norm(tokens).mT.unflatten(2, (4, 4))).relu().mean((2, 3)))

    def forward(self, batch):
        batch = self.twice(self.twice(self.stem(batch).add_(1)))
        return self.head(self.vit.blocks(self.vit._pos_embed(self.vit.patch_embed(batch))))


def test_convolutions_before_and_after_the_blocks():
    torch.manual_seed(3)
    model, batch = Convolutions().eval(), images()
    for _ in range(2):
        read, blocks = range(16), model.vit.blocks
        assert_equals_naive(model, batch, TARGET, score, (4, 4), read, blocks, model.head, prefix=0)


def test_legrad_of_a_wrapped_network_costs_one_more_patch_embedding():
    network = vit(depth=2, patch_size=16, img_size=64)
    costs = []
    for model in (network, nn.Sequential(network)):
        with Operations() as counted:
            gmarpp.explain(model, images(size=(64, 64)), "legrad", [[1, 2, 3]] * 3)
        costs.append(counted.total)
    embedding = 2 * 3 * 16 * 48 * (3 * 16 * 16)
    assert costs[1] <= costs[0] + embedding


class Lightning(lightning.LightningModule):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, batch):
        return self.net(batch)


def test_a_module_without_a_forward_says_so():
    class Training(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = vit()

    with pytest.raises(gmarpp.UnsupportedNetworkError, match=r"Training does not run.*explain the network inside it"):
        gmarpp.explain(Training(), images())


class Peft(nn.Module):
    """The structure of peft's wrapper: weights of low rank beside each projection, two modules around the network."""

    class Lora(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base_layer = base
            self.lora_A = nn.ModuleDict({"default": nn.Linear(base.in_features, 2, bias=False)})
            self.lora_B = nn.ModuleDict({"default": nn.Linear(2, base.out_features, bias=False)})

        def forward(self, tokens):
            return self.base_layer(tokens) + self.lora_B["default"](self.lora_A["default"](tokens))

    def __init__(self, network):
        super().__init__()
        network = copy.deepcopy(network)
        for block in network.blocks:
            block.attn.qkv = self.Lora(block.attn.qkv)
        self.base_model = nn.Module()
        self.base_model.model = network

    def forward(self, *args, **kwargs):
        return self.base_model.model(*args, **kwargs)


def timm_wrapper(network):
    config = transformers.TimmWrapperConfig(
        architecture="vit_tiny_patch16_224",
        model_args=SMALL | {"class_token": network.cls_token is not None, "global_pool": network.global_pool},
        num_labels=7,
    )
    model = transformers.TimmWrapperForImageClassification(config).eval()
    model.timm_model.load_state_dict(network.state_dict())
    return model


def deep(network):
    return nn.Sequential(nn.Identity(), nn.ModuleDict({"a": nn.Sequential(nn.Identity(), network)})["a"])


WRAPPERS = {
    "Sequential": lambda network: nn.Sequential(nn.Identity(), network),
    "deep inside": deep,
    "DataParallel": DataParallel,
    "LightningModule": Lightning,
    "peft": Peft,
    "TimmWrapper": timm_wrapper,
    "compiled": torch.compile,
    "compiled inside": lambda network: nn.Sequential(torch.compile(network)),
    "compiled wrapper": lambda network: torch.compile(nn.Sequential(network)),
    "twice": lambda network: DataParallel(Lightning(network)),
}


@pytest.mark.parametrize("kind", WRAPPERS)
@pytest.mark.parametrize("pool", ["token", "avg", "map"])
def test_wrappers_are_explained_as_what_they_wrap(kind, pool):
    torch.manual_seed(0)
    network, batch = vit(global_pool=pool), images()
    model = WRAPPERS[kind](network).eval()
    classes = torch.tensor([[1, 5], [4, 0], [2, 2]])
    if kind == "peft":
        network = model.base_model.model
    expected = gmarpp.explain(network, batch, gmarpp.METHODS + gmarpp.VARIANTS, classes)
    found = gmarpp.explain(model, batch, gmarpp.METHODS + gmarpp.VARIANTS, classes)
    torch.testing.assert_close(found.logits, expected.logits)
    for method in expected.maps:
        assert relative_error(found.maps[method], expected.maps[method]) < 1e-5, method


def test_one_process_of_distributed_training_explains_alone(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        network, batch = vit(), images()
        model = DistributedDataParallel(network)
        expected = gmarpp.explain(network, batch, gmarpp.METHODS).maps
        model.forward = None  # its own would wait for the other processes
        found = gmarpp.explain(model, batch, gmarpp.METHODS).maps
        assert all(relative_error(found[method], expected[method]) < 1e-6 for method in expected)
    finally:
        torch.distributed.destroy_process_group()


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.student, self.teachers = vit(), nn.ModuleList([vit(seed=1)])

    def forward(self, batch):
        return self.student(batch)


def test_several_known_networks_inside_one_are_named():
    model, batch = Two(), images()
    message = r"student \(VisionTransformer\), teachers\.0 \(VisionTransformer\).*get_submodule\('student'\)"
    with pytest.raises(gmarpp.UnsupportedNetworkError, match=message):
        gmarpp.explain(model, batch)
    layout = gmarpp.architecture_of(model.get_submodule("student"))
    found = gmarpp.explain(model, batch, gmarpp.METHODS, architecture=layout).maps
    expected = gmarpp.explain(model.student, batch, gmarpp.METHODS).maps
    assert all(relative_error(found[method], expected[method]) < 1e-6 for method in expected)


def test_one_network_under_two_names_is_one():
    model = nn.Sequential(vit())
    model.add_module("alias", nn.Identity())
    model.alias.net = model[0]
    assert gmarpp.architecture_of(model).prefix_tokens == 1


class Noisy(nn.Module):
    """A head whose output depends on more than the last tokens."""

    def __init__(self, kind):
        super().__init__()
        self.net, self.kind, self.calls = vit(), kind, 0

    def forward(self, batch):
        self.calls += 1
        if self.kind == "a state":
            return self.net(batch) * self.calls
        middle = self.net.blocks[0](self.net._pos_embed(self.net.patch_embed(batch)))
        tokens = middle
        for block in self.net.blocks[1:]:
            tokens = block(tokens)
        return self.net.forward_head(self.net.norm(tokens)) + self.net.forward_head(self.net.norm(middle))


class InPlace(nn.Module):
    """Adds to tokens in place, between the blocks."""

    def __init__(self):
        super().__init__()
        self.net = vit()

    def forward(self, batch):
        tokens = self.net._pos_embed(self.net.patch_embed(batch))
        for block in self.net.blocks[:-1]:
            tokens = block(tokens)
            tokens += 0.1
        return self.net.forward_head(self.net.norm(self.net.blocks[-1](tokens)))


def test_tokens_may_change_in_place_between_blocks():
    model, batch = InPlace(), images()
    together = gmarpp.explain(model, batch, ("rollout", "chefer"), TARGET).maps["rollout"]
    alone = gmarpp.explain(model, batch, "rollout", TARGET).maps["rollout"]
    assert relative_error(alone, together) < 1e-5


def test_legrad_refuses_a_network_that_keeps_a_state():
    with pytest.raises(gmarpp.UnsupportedNetworkError, match=r"not all of its output.*Leave LeGrad out"):
        gmarpp.explain(Noisy("a state"), images(), "legrad", TARGET)


@pytest.mark.parametrize("methods", ["attention", "legrad"])
def test_a_head_that_reads_several_layers_is_an_error_for_methods_of_one(methods):
    with pytest.raises(gmarpp.UnsupportedNetworkError, match=r"tokens that leave blocks \[0\]"):
        gmarpp.explain(Noisy("an earlier block"), images(), methods, TARGET)


def test_a_replay_leaves_other_threads_and_the_network_alone():
    model, batch = nn.Sequential(vit()), images()
    expected, errors = model(batch).detach(), []
    done = threading.Event()

    def run():
        try:
            while not done.is_set():
                with torch.no_grad():
                    errors.append((model(batch) - expected).abs().max().item())
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        for _ in range(5):
            gmarpp.explain(model, batch, "legrad", TARGET)
    finally:
        done.set()
        thread.join()
    assert len(errors) > 5
    assert max(errors) < 1e-4 * expected.abs().max()
    assert not any("forward" in vars(module) for module in model.modules())


def test_a_network_of_an_unknown_family_says_what_to_do():
    model = nn.Sequential(nn.MultiheadAttention(48, 3))
    with pytest.raises(gmarpp.UnsupportedNetworkError, match=r"Sequential.*Architecture\(grid="):
        gmarpp.explain(model, images())
    network, batch = nn.Sequential(vit()), images()
    by_hand = gmarpp.Architecture(grid=lambda height, width: (height // 8, width // 8), prefix_tokens=1)
    expected = gmarpp.explain(network, batch).maps["gmarpp_l1"]
    torch.testing.assert_close(gmarpp.explain(network, batch, architecture=by_hand).maps["gmarpp_l1"], expected)
    with pytest.raises(gmarpp.UnsupportedNetworkError, match="LeGrad and recomputation need the network's blocks"):
        gmarpp.explain(network, batch, "legrad", architecture=by_hand)
    wrong = gmarpp.Architecture(grid=lambda height, width: (4, 4), prefix_tokens=0)
    with pytest.raises(gmarpp.UnsupportedNetworkError, match="attends over 17 tokens, but a patch grid of 4 x 4 and 0"):
        gmarpp.explain(network, batch, architecture=wrong)
