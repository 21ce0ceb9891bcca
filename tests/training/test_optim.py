import math

import lightning as L
import pytest
import timm
import torch
from quiet_trainer import quiet_trainer
from squares import OrderedSquares
from timm.optim import param_groups_layer_decay
from torch.optim import AdamW

from gmarpp.training import optim
from gmarpp.training.module import ViTClassifier
from gmarpp.training.optim import Optimization, adamw, parameter_groups, warmup_cosine, warmup_cosine_schedule

DEPTH = 3


@pytest.fixture
def model():
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, depth=DEPTH, embed_dim=32, num_heads=2, num_classes=5
    )


def rate_of(groups, parameter):
    return next(group for group in groups if any(candidate is parameter for candidate in group["params"]))


def test_rates_decay_by_layer_and_are_really_used(model):
    groups = AdamW(parameter_groups(model, lr=0.4, weight_decay=0.05, layer_decay=0.5)).param_groups
    assert rate_of(groups, model.head.weight)["lr"] == pytest.approx(0.4)
    # the final norm counts as the layer below the head's in timm's matcher, the embeddings as the lowest of all
    distances = [round(math.log(rate_of(groups, block.attn.qkv.weight)["lr"] / 0.4, 0.5), 6) for block in model.blocks]
    assert distances == [distances[-1] + DEPTH - 1 - index for index in range(DEPTH)]
    assert distances[-1] >= 1
    assert rate_of(groups, model.patch_embed.proj.weight)["lr"] == pytest.approx(0.4 * 0.5 ** (distances[0] + 1))
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))


def test_no_decay_of_biases_norms_and_embeddings(model):
    groups = parameter_groups(model, lr=1.0, weight_decay=0.05, layer_decay=0.75)
    for parameter in (model.head.bias, model.norm.weight, model.pos_embed, model.cls_token, model.blocks[0].norm1.bias):
        assert rate_of(groups, parameter)["weight_decay"] == 0
    for parameter in (model.head.weight, model.blocks[1].mlp.fc1.weight, model.patch_embed.proj.weight):
        assert rate_of(groups, parameter)["weight_decay"] == 0.05


def test_frozen_parameters_are_left_out(model):
    model.requires_grad_(False)
    model.head.requires_grad_(True)
    groups = parameter_groups(model, lr=1.0, weight_decay=0.05, layer_decay=0.75)
    assert {id(p) for group in groups for p in group["params"]} == {id(p) for p in model.head.parameters()}


def layers_below_the_head(name):
    if name.startswith("blocks."):
        return DEPTH - int(name.split(".")[1])
    # timm counts the final norm to the last block
    return {"head": 0, "norm": 1}.get(name.split(".")[0], DEPTH + 1)


def test_every_groups_rate_follows_the_formula_through_a_run(model):
    total, warmup, floor, peak, decay = 20, 4, 0.1, 0.3, 0.5
    optimizer = AdamW(parameter_groups(model, peak, 0.05, decay))
    names = {parameter: name for name, parameter in model.named_parameters()}
    schedule = warmup_cosine_schedule(optimizer, total, warmup, floor)
    expected = {
        0: 1 / 5,  # the first of 4 warm-up steps
        3: 4 / 5,
        4: 1.0,  # the peak, right after the warm-up
        12: 0.1 + 0.9 * 0.5,  # half way down the cosine
        20: 0.1,
    }
    for step in range(total + 1):
        if step in expected:
            print(f"step {step}")
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    rate = peak * decay ** layers_below_the_head(names[parameter]) * expected[step]
                    assert group["lr"] == pytest.approx(rate), (step, names[parameter])
                print(f"{group['lr']:.5f}  decay {group['weight_decay']:.2f}  {names[group['params'][0]]} …")
        optimizer.step()
        schedule.step()


def test_schedule_without_warmup_starts_at_the_peak_and_never_leaves_the_floor():
    assert warmup_cosine(0, total=10, warmup=0) == 1
    assert warmup_cosine(15, total=10, warmup=0, floor=0.2) == pytest.approx(0.2)
    assert warmup_cosine(0, total=1, warmup=0) == 1


def test_schedule_state_restores_the_rate():
    def fresh():
        optimizer = AdamW([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        return optimizer, warmup_cosine_schedule(optimizer, total=10, warmup=2)

    optimizer, schedule = fresh()
    for _ in range(5):
        optimizer.step()
        schedule.step()
    resumed_optimizer, resumed = fresh()
    resumed_optimizer.load_state_dict(optimizer.state_dict())
    resumed.load_state_dict(schedule.state_dict())
    for each in (schedule, resumed):
        each.optimizer.step()
        each.step()
    assert resumed.get_last_lr() == schedule.get_last_lr() == [pytest.approx(0.5 * (1 + math.cos(math.pi * 4 / 8)))]


def test_layers_of_one_rate_share_a_group_and_learn_as_before(model):
    groups = parameter_groups(model, 0.01, 0.05, layer_decay=1.0)
    assert [(group["lr"], group["weight_decay"]) for group in groups] == [(0.01, 0), (0.01, 0.05)]
    start = {name: value.clone() for name, value in model.state_dict().items()}
    apart = param_groups_layer_decay(model, 0.05, model.no_weight_decay(), layer_decay=1.0)
    assert len(apart) > len(groups)
    learned = []
    for optimizer in (adamw(groups, (0.9, 0.999)), AdamW([{**group, "lr": 0.01} for group in apart])):
        model.load_state_dict(start)
        for step in range(3):
            optimizer.zero_grad()
            model(torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(step))).square().sum().backward()
            optimizer.step()
        learned.append({name: value.clone() for name, value in model.state_dict().items()})
    assert all(torch.equal(value, learned[1][name]) for name, value in learned[0].items())


class Losses(L.Callback):
    def __init__(self):
        self.values = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.values.append(outputs["loss"].item())


def fit(folder, resume=None, **options):
    torch.manual_seed(0)
    constant = Optimization(1e-2, warmup=0, min_lr_ratio=1)
    network = ViTClassifier("test_vit", 3, 32, pretrained=False, model_args={"depth": 2}, optimizer=constant)
    losses = Losses()
    run = quiet_trainer(folder, callbacks=[losses], enable_checkpointing=False, limit_val_batches=0, **options)
    run.fit(network, OrderedSquares(), ckpt_path=resume)
    return losses.values, run


@pytest.mark.parametrize("options", [{}, {"precision": "bf16-mixed", "gradient_clip_val": 0.1}])
def test_one_kernel_per_group_learns_the_same_and_clips(tmp_path, monkeypatch, options):
    """As on a GPU; a CPU has the kernel, too."""
    losses, _ = fit(tmp_path, max_epochs=2, **options)
    monkeypatch.setattr(optim, "_on_gpu", lambda groups: True)
    fused, run = fit(tmp_path, max_epochs=2, **options)
    assert {group["fused"] for group in run.optimizers[0].param_groups} == {True}
    assert fused == pytest.approx(losses, rel=1e-2 if options else 1e-5)
    assert min(losses) < losses[0]


@pytest.mark.parametrize("first", [True, False])
def test_a_resumed_run_takes_the_kernel_of_its_own_machine(tmp_path, monkeypatch, first):
    whole, _ = fit(tmp_path, max_epochs=2)
    monkeypatch.setattr(optim, "_on_gpu", lambda groups: first)
    _, run = fit(tmp_path, max_epochs=1)
    run.save_checkpoint(tmp_path / "run.ckpt")
    monkeypatch.setattr(optim, "_on_gpu", lambda groups: not first)
    resumed, run = fit(tmp_path, resume=tmp_path / "run.ckpt", max_epochs=2)
    assert {group["fused"] for group in run.optimizers[0].param_groups} == {None if first else True}
    assert resumed == pytest.approx(whole[3:], rel=1e-5)
