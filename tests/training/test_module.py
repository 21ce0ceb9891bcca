import math
import random
from types import SimpleNamespace

import lightning as L
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.strategies import SingleDeviceStrategy
from noise import write_noise
from squares import ColouredSquares, OrderedSquares, Squares
from torch import nn
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

from gmarpp.callbacks import AveragedWeights
from gmarpp.data import Augmentation, ImageFolder
from gmarpp.network.files.load import describe_weights, load_model
from gmarpp.network.files.save import save_weights
from gmarpp.training import start
from gmarpp.training.evaluation import counted_images
from gmarpp.training.execution import Execution
from gmarpp.training.hyperparameters import arguments
from gmarpp.training.mixing import Mixing
from gmarpp.training.module import ViTClassifier
from gmarpp.training.network_choice import load_classifier
from gmarpp.training.optim import Optimization

TINY = {"depth": 2}


def classifier(**options):
    torch.manual_seed(0)
    defaults = {"architecture": "test_vit", "num_classes": 3, "image_size": 32, "pretrained": False, "model_args": TINY}
    return ViTClassifier(**{**defaults, "optimizer": optimizer(), **options})


def optimizer(**options):
    return Optimization(**{"lr": 1e-3, "layer_decay": 1.0, **options})


def trainer(folder, **options):
    defaults = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return L.Trainer(default_root_dir=folder, **{**defaults, "enable_checkpointing": False, "max_steps": 4, **options})


@pytest.fixture
def start_file(tmp_path):
    model = classifier(num_classes=4, image_size=48, preprocessing={"mean": [0.1, 0.2, 0.3], "crop_pct": 1.0}).model
    model.classes, model.class_names = tuple("abcd"), tuple("ABCD")
    save_weights(model, tmp_path / "start.safetensors")
    return tmp_path / "start.safetensors"


def test_learns_and_reports_metrics_by_hand(tmp_path):
    network, data = classifier(), Squares()
    run = trainer(tmp_path, max_steps=60, check_val_every_n_epoch=20)
    run.fit(network, data)
    metrics = run.validate(network, data, verbose=False)[0]
    assert metrics["val/accuracy"] > 0.9

    squares = ColouredSquares(23, 3, seed=1)
    with torch.no_grad():
        logits = network.eval()(squares.images)
    confidence, predicted = logits.softmax(-1).max(-1)
    right = (predicted == squares.labels).float()
    expected_error = 0.0
    for low in range(15):  # expected calibration error over 15 equal bins, Naeini et al. 2015
        inside = (confidence > low / 15) & (confidence <= (low + 1) / 15)
        if inside.any():
            expected_error += inside.float().mean() * (confidence[inside].mean() - right[inside].mean()).abs()
    assert metrics["val/loss"] == pytest.approx(F.cross_entropy(logits, squares.labels).item(), rel=1e-4)
    assert metrics["val/accuracy"] == pytest.approx(right.mean().item())
    assert metrics["val/accuracy_top5"] == 1
    assert metrics["val/calibration_error"] == pytest.approx(float(expected_error), abs=1e-4)
    assert run.test(network, data, verbose=False)[0]["test/accuracy"] == metrics["val/accuracy"]


def test_start_weights_decide_size_and_preprocessing(start_file):
    network = classifier(weights=str(start_file), image_size=None)
    assert network.hparams["image_size"] == [48, 48]
    assert network.preprocessing.size == (48, 48)
    assert network.preprocessing.mean == (0.1, 0.2, 0.3)
    assert network.preprocessing.crop_pct == 1
    overridden = classifier(weights=str(start_file), image_size=32, preprocessing={"mean": [0, 0, 0]})
    assert overridden.preprocessing.size == (32, 32)
    assert overridden.preprocessing.mean == (0, 0, 0)
    assert overridden.preprocessing.crop_pct == 1


def test_default_preprocessing_is_timms():
    network = classifier(architecture="vit_large_patch16_224.augreg_in21k_ft_in1k", image_size=None, model_args=TINY)
    assert network.preprocessing.mean == network.preprocessing.std == (0.5, 0.5, 0.5)
    assert network.preprocessing.interpolation == "bicubic"
    assert network.hparams["image_size"] == [224, 224]


def test_start_weights_are_loaded_when_fit_starts_and_only_once(tmp_path, start_file):
    network = classifier(weights=str(start_file), optimizer=optimizer(lr=1e-12, weight_decay=0.0))
    expected = load_model(start_file).blocks[1].mlp.fc1.weight
    assert not torch.equal(network.model.blocks[1].mlp.fc1.weight, expected)
    trainer(tmp_path).fit(network, Squares())
    torch.testing.assert_close(network.model.blocks[1].mlp.fc1.weight, expected, rtol=0, atol=1e-8)
    with torch.no_grad():
        network.model.blocks[1].mlp.fc1.weight.zero_()
    trainer(tmp_path).fit(network, Squares())
    assert network.model.blocks[1].mlp.fc1.weight.abs().max() < 1e-8


def test_a_checkpoint_needs_neither_hub_nor_start_weights(tmp_path, monkeypatch):
    def no_hub(*_):
        raise AssertionError("the Hub was asked")

    network = classifier()
    run = trainer(tmp_path)
    run.fit(network, Squares())
    run.save_checkpoint(tmp_path / "run.ckpt")
    monkeypatch.setattr(start, "load_pretrained", no_hub)
    for weights in (None, "gone.safetensors"):
        options = {"pretrained": True, "weights": weights}
        resumed = ViTClassifier.from_weights(describe_weights(tmp_path / "run.ckpt"), **options)
        assert options.items() <= resumed.hparams.items()
        again = trainer(tmp_path, max_steps=5)
        again.fit(resumed, Squares(), ckpt_path=tmp_path / "run.ckpt")
        assert again.global_step == 5
        again.validate(
            ViTClassifier(**arguments({**network.hparams, "pretrained": True})),
            Squares(),
            ckpt_path=tmp_path / "run.ckpt",
            verbose=False,
        )
    with pytest.raises(AssertionError, match="the Hub was asked"):
        trainer(tmp_path).fit(classifier(pretrained=True), Squares())


def test_checkpoint_carries_classes_size_and_preprocessing(tmp_path):
    network = classifier(preprocessing={"mean": [0.2, 0.2, 0.2]})
    run = trainer(tmp_path)
    run.fit(network, Squares())
    run.save_checkpoint(tmp_path / "run.ckpt")
    images = torch.randn(2, 3, 32, 32)
    for loaded in (
        load_classifier(tmp_path / "run.ckpt"),
        ViTClassifier.load_from_checkpoint(tmp_path / "run.ckpt").eval(),
    ):
        assert loaded.classes == ("class0", "class1", "class2")
        assert loaded.class_names == loaded.model.class_names == ("Color 0", "Color 1", "Color 2")
        assert loaded.preprocessing == network.preprocessing
        assert torch.equal(loaded(images), network.eval()(images))
    model = load_model(tmp_path / "run.ckpt")
    assert torch.equal(model(images), network.eval()(images))
    assert model.class_names == ("Color 0", "Color 1", "Color 2")


def test_classes_of_checkpoint_and_data_must_agree(tmp_path):
    run = trainer(tmp_path)
    run.fit(classifier(), Squares())
    run.save_checkpoint(tmp_path / "run.ckpt")
    message = r"Squares: 3: other0, other1, other2.*run\.ckpt was trained on \(3: class0, .*differ at index 0"
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path).fit(classifier(), Squares(prefix="other"), ckpt_path=tmp_path / "run.ckpt")
    with pytest.raises(ValueError, match=r"Squares: 4: class0, .*differ at index 3"):
        trainer(tmp_path).validate(load_classifier(tmp_path / "run.ckpt"), Squares(num_classes=4))


def test_class_count_of_data_and_model_must_agree(tmp_path):
    with pytest.raises(ValueError, match=r"4 classes and num_classes is 3: set --model\.num_classes 4"):
        trainer(tmp_path).fit(classifier(), Squares(num_classes=4))


def test_evaluating_start_weights_needs_their_head(tmp_path, start_file):
    data = Squares(num_classes=4)
    data.classes = tuple("abcd")
    network = classifier(num_classes=4, weights=str(start_file), image_size=32)
    trainer(tmp_path).validate(network, data, verbose=False)
    assert torch.equal(network.model.head.weight, load_model(start_file).head.weight)
    with pytest.raises(ValueError, match="no head for the data's 4 classes"):
        trainer(tmp_path).validate(classifier(num_classes=4, weights=str(start_file)), Squares(num_classes=4))


def test_start_weights_name_the_architecture(start_file, tmp_path):
    assert ViTClassifier(num_classes=3, weights=str(start_file)).hparams["architecture"] == "test_vit"
    torch.save(load_model(start_file).state_dict(), tmp_path / "plain.pth")
    with pytest.raises(ValueError, match=r"plain\.pth does not name its architecture: set --model\.architecture"):
        ViTClassifier(num_classes=3, weights=str(tmp_path / "plain.pth"))


def test_start_weights_of_another_architecture(start_file):
    with pytest.raises(ValueError, match=r"holds a test_vit, .*--model\.architecture test_vit"):
        classifier(architecture="vit_tiny_patch16_224", weights=str(start_file))


def test_start_weights_with_the_tag_of_the_weights_that_they_came_of(tmp_path):
    save_weights(classifier(architecture="test_vit.r160_in1k").model, tmp_path / "tagged.safetensors")
    for options in ({"architecture": None}, {"architecture": "test_vit.r160_in1k"}, {"architecture": "test_vit"}):
        network = classifier(weights=str(tmp_path / "tagged.safetensors"), **options)
        assert network.hparams["architecture"].partition(".")[0] == "test_vit"
    run = trainer(tmp_path)
    run.fit(classifier(architecture="test_vit.r160_in1k"), Squares())
    run.save_checkpoint(tmp_path / "tagged.ckpt")
    for options in ({"architecture": None}, {"architecture": "test_vit.r160_in1k"}, {"architecture": "test_vit"}):
        network = classifier(weights=str(tmp_path / "tagged.ckpt"), **options)
        assert network.hparams["architecture"].partition(".")[0] == "test_vit"


def test_evaluating_pretrained_weights_needs_their_head(tmp_path, monkeypatch):
    monkeypatch.setattr(start, "load_pretrained", lambda *_: False)
    with pytest.raises(ValueError, match=r"test_vit has no head for the data's 3 classes.*--ckpt_path"):
        trainer(tmp_path).validate(classifier(pretrained=True), Squares())
    network = classifier(pretrained=True)
    trainer(tmp_path).fit(network, Squares())
    trainer(tmp_path).validate(network, Squares(), verbose=False)
    monkeypatch.setattr(start, "load_pretrained", lambda *_: True)
    trainer(tmp_path).test(classifier(pretrained=True), Squares(), verbose=False)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("optimizer.lr", 0), ("optimizer.lr", -1e-3), ("optimizer.lr", math.nan), ("optimizer.lr", math.inf),
        ("optimizer.min_lr_ratio", -1), ("optimizer.min_lr_ratio", 1.5), ("optimizer.weight_decay", -1),
        ("optimizer.weight_decay", math.nan), ("optimizer.lr_batch_size", 0), ("optimizer.lr_batch_size", -4),
        ("optimizer.betas", (0.9, 1.0)), ("optimizer.betas", (-1, 0.9)), ("optimizer.betas", (0.9, math.nan)),
        ("optimizer.betas", (0.9,)), ("optimizer.layer_decay", 0), ("optimizer.layer_decay", 1.1),
        ("optimizer.warmup", 1), ("mixing.mixup", -1), ("mixing.cutmix", math.nan), ("mixing.label_smoothing", -0.1),
        ("drop_path", 1), ("num_classes", 1), ("image_size", 0), ("image_size", [32]), ("image_size", [32, 32, 32]),
        ("image_size", [32, -32]), ("model_args", {"depth": -1}), ("model_args", {"embed_dim": 7}),
        ("model_args", {"patch_size": 0}), ("preprocessing", {"mean": [1]}), ("preprocessing", {"mean": "gray"}),
        ("preprocessing", {"mean": [math.nan, 0, 0]}), ("preprocessing", {"std": [0, 1, 1]}),
        ("preprocessing", {"crop_pct": 2}), ("preprocessing", {"crop_pct": 0}),
        ("preprocessing", {"interpolation": "cubical"}),
    ],
)  # fmt: skip
def test_options_out_of_range_are_named(option, value):
    group, _, name = option.rpartition(".")
    options = {group: {name: value}} if group else {option: value}
    with pytest.raises(ValueError, match=rf"--model\.{option}") as refusal:
        classifier(**arguments(options))
    assert repr(value) in str(refusal.value)


def test_loss_that_is_not_finite_names_step_files_and_remedy(tmp_path):
    class Broken(Squares):
        def train_dataloader(self):
            squares = ColouredSquares(24, 3, seed=0)
            squares.images[13] = float("nan")
            return DataLoader(squares, batch_size=8)

    with pytest.raises(
        FloatingPointError,
        match=r"not finite at step 1; .*square008\.png, .*square013\.png.*lower --model\.optimizer\.lr",
    ):
        trainer(tmp_path).fit(classifier(), Broken())


def test_loss_that_is_not_finite_leaves_the_weights_of_the_step_before(tmp_path):
    class Broken(OrderedSquares):
        def train_dataloader(self):
            loader = super().train_dataloader()
            loader.dataset.images[13] = float("nan")
            return loader

    diverged, stopped = classifier(), classifier()
    stopped.load_state_dict(diverged.state_dict())
    with pytest.raises(FloatingPointError, match="not finite at step 1"):
        trainer(tmp_path).fit(diverged, Broken())
    trainer(tmp_path, max_epochs=-1, max_steps=1).fit(stopped, Broken())
    assert all(torch.equal(value, stopped.state_dict()[name]) for name, value in diverged.state_dict().items())


def test_endless_run_has_no_schedule(tmp_path):
    with pytest.raises(ValueError, match=r"set --trainer\.max_epochs or --trainer\.max_steps"):
        trainer(tmp_path, max_steps=-1, max_epochs=-1).fit(classifier(), Squares())


def test_head_only_changes_nothing_else(tmp_path):
    network = classifier(head_only=True)
    before = {key: value.clone() for key, value in network.model.state_dict().items()}
    trainer(tmp_path).fit(network, Squares())
    changed = {key for key, value in network.model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == {"head.weight", "head.bias"}


def test_mixed_targets_match_the_mixed_images(tmp_path):
    network = classifier(mixing=Mixing(mixup=0.8, label_smoothing=0.1))
    images = torch.stack([torch.full((3, 32, 32), float(value)) for value in (0, 1)])
    for _ in range(5):
        mixed, target = network.mix(images.clone(), torch.tensor([0, 1]))
        share = mixed[0, 0, 0, 0].item()  # of the second image in the first
        smooth = torch.tensor([0.1 / 3 + 0.9 * (1 - share), 0.1 / 3 + 0.9 * share, 0.1 / 3])
        torch.testing.assert_close(target[0], smooth, rtol=0, atol=1e-5)
    trainer(tmp_path).fit(classifier(mixing=Mixing(mixup=0.8, cutmix=1.0)), Squares())


def test_mixing_needs_an_even_batch(tmp_path):
    with pytest.raises(ValueError, match="this batch has 7: set an even batch size"):
        trainer(tmp_path).fit(classifier(mixing=Mixing(cutmix=1.0)), Squares(batch_size=7))


@pytest.mark.parametrize("limits", [{"max_epochs": 1, "max_steps": -1}, {"max_steps": 1}])
def test_effective_batch_size_is_stated_and_scales_the_rate(tmp_path, caplog, limits):
    network = classifier(optimizer=optimizer(lr_batch_size=8, warmup=0.0))
    run = trainer(tmp_path, accumulate_grad_batches=3, **limits)
    with caplog.at_level("INFO"):
        run.fit(network, Squares())
    assert "Effective batch size 24 = 8 x 1 devices x 1 nodes x 3 accumulated; learning rate 0.003" in caplog.text
    assert run.optimizers[0].param_groups[-1]["initial_lr"] == pytest.approx(0.003)


def test_steps_follow_warmup_and_cosine(tmp_path):
    network = classifier(optimizer=optimizer(lr=1e-2, warmup=0.25, min_lr_ratio=0.1))
    seen = []

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            seen.append(trainer.callback_metrics["train/lr"].item())

    trainer(tmp_path, max_steps=8, callbacks=[Watch()]).fit(network, Squares())
    # 2 warm-up steps of 8, then half a cosine over 6 down to a tenth; the value of step 8 is never used
    assert seen[:3] == pytest.approx([1e-2 / 3, 2e-2 / 3, 1e-2])
    assert seen[5] == pytest.approx(1e-2 * (0.1 + 0.9 * 0.5))
    assert len(seen) == 8


def test_resumed_run_continues_at_the_right_step_and_rate(tmp_path):
    losses = {}

    class Losses(L.Callback):
        def __init__(self, name):
            self.record = losses.setdefault(name, [])

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            self.record.append((trainer.global_step, outputs["loss"].item()))

    class Ordered(Squares):
        def train_dataloader(self):
            return DataLoader(ColouredSquares(24, 3, seed=0), batch_size=8)

    options = {"max_epochs": 4, "max_steps": -1}
    trainer(tmp_path, callbacks=[Losses("whole")], **options).fit(classifier(), Ordered())

    class Stop(L.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            if trainer.current_epoch == 1:
                trainer.save_checkpoint(tmp_path / "half.ckpt")

    trainer(tmp_path, callbacks=[Stop()], **options).fit(classifier(), Ordered())
    resumed = trainer(tmp_path, callbacks=[Losses("resumed")], **options)
    resumed.fit(classifier(), Ordered(), ckpt_path=tmp_path / "half.ckpt")
    assert losses["resumed"] == losses["whole"][6:]
    assert losses["resumed"][0][0] == 7


@pytest.mark.parametrize("limits", [{"max_epochs": 2, "max_steps": -1}, {"max_steps": 12}])
def test_resumed_run_repeats_images_dropout_mixup_and_augmentation(tmp_path, limits):
    root = str(write_noise(tmp_path / "noise"))

    class Record(L.Callback):
        def on_train_start(self, trainer, pl_module):
            self.steps, self.seeds = [], []

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            self.steps.append((trainer.global_step, batch["index"].tolist(), outputs["loss"].item()))
            self.seeds.append(torch.initial_seed())
            if trainer.ckpt_path is None and trainer.global_step in (2, 6, 9):
                trainer.save_checkpoint(tmp_path / f"{trainer.global_step}.ckpt")

    def fit(resume=None):
        record = Record()
        run = trainer(tmp_path, callbacks=[record], **limits)
        augmentation = Augmentation(policy="randaugment", erasing=0.5)
        data = ImageFolder(root, labelled=True, batch_size=4, num_workers=0, augmentation=augmentation)
        network = classifier(drop_path=0.5, mixing=Mixing(0.8, 1.0), optimizer=optimizer(lr=1e-2))
        torch.manual_seed(5 if resume is None else 6)
        run.fit(network, data, ckpt_path=resume)
        return record

    whole = fit()
    assert len(set(whole.seeds)) == len(whole.steps) == 12
    for step in (2, 6, 9):
        assert fit(tmp_path / f"{step}.ckpt").steps == whole.steps[step:], step


def test_steps_of_other_seeds_and_ranks_draw_other_numbers(tmp_path):
    def draws(seed, rank):
        network = classifier()
        network.trainer = SimpleNamespace(global_rank=rank, current_epoch=0)
        network._seed = seed
        network.on_train_batch_start({}, 3)
        return torch.rand(()).item(), np.random.rand(), random.random()

    assert draws(1, 0) == draws(1, 0)
    for one, two in zip(draws(1, 0) * 2, draws(2, 0) + draws(1, 1), strict=True):
        assert one != two


def test_strategy_that_shares_the_network_out_is_refused(tmp_path):
    class Sharded(SingleDeviceStrategy):
        restore_checkpoint_after_setup = True

    with pytest.raises(ValueError, match=r"Sharded shares the network out .*--trainer\.strategy ddp"):
        trainer(tmp_path, accelerator="auto", strategy=Sharded()).fit(classifier(), Squares())


def test_compiled_and_averaged_checkpoints_have_clean_keys(tmp_path, monkeypatch):
    # compiling takes a minute of C++; the eager backend takes the same path through the checkpoint
    monkeypatch.setattr(nn.Module, "compile", lambda self: setattr(self, "_compiled_call_impl", self._call_impl))
    network = classifier(execution=Execution(gradient_checkpointing=True, compile=True, channels_last=True))
    run = trainer(tmp_path, callbacks=[AveragedWeights(decay=0.5)])
    run.fit(network, Squares())
    run.save_checkpoint(tmp_path / "run.ckpt")
    keys = torch.load(tmp_path / "run.ckpt", weights_only=True)["state_dict"].keys()
    assert keys == {f"model.{key}" for key in classifier().model.state_dict()}
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(load_model(tmp_path / "run.ckpt")(images), network.eval()(images))


def test_a_compiled_network_trains_as_it_does_otherwise(tmp_path, monkeypatch):
    compile_network, weights = nn.Module.compile, []
    monkeypatch.setattr(nn.Module, "compile", lambda self: compile_network(self, backend="eager"))
    for compiled in (False, True):
        network = classifier(execution=Execution(compile=compiled))
        trainer(tmp_path, max_steps=2).fit(network, OrderedSquares())
        weights.append(torch.cat([parameter.detach().flatten() for parameter in network.parameters()]))
    assert network.model._compiled_call_impl is not None
    torch.testing.assert_close(*weights)


def test_predict_returns_logits_or_what_the_explainer_says(tmp_path):
    network = classifier()
    logits = torch.cat(trainer(tmp_path).predict(network, Squares()))
    torch.testing.assert_close(logits, network(ColouredSquares(23, 3, seed=1).images), rtol=1e-4, atol=1e-5)
    network.explainer = lambda model, batch: (model is network.model, batch["path"][0])
    assert trainer(tmp_path).predict(network, Squares())[1] == (True, "square008.png")


def test_repeats_of_a_distributed_sampler_and_unlabelled_images_are_not_counted():
    squares = ColouredSquares(10, 3, seed=0)
    squares.labels[4] = -1
    seen = []
    for rank in range(4):
        sampler = DistributedSampler(squares, num_replicas=4, rank=rank, shuffle=False)
        loader = DataLoader(squares, batch_size=2, sampler=sampler)
        for batch_idx, batch in enumerate(loader):
            seen += batch["index"][counted_images(batch, batch_idx, [None, loader], 1)].tolist()
    # 10 images on 4 ranks make 3 rounds, whose last repeats images 0 and 1
    assert sorted(seen) == [0, 1, 2, 3, 5, 6, 7, 8, 9]
