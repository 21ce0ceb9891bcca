import io

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image
from signed_method import Downwards
from squares import ColouredSquares, OrderedSquares, Squares
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import gmarpp
from gmarpp.callbacks import AttributionMonitor, AveragedWeights
from gmarpp.data.probe import spread_over_classes
from gmarpp.explainer import Explainer
from gmarpp.metrics import METRICS
from gmarpp.perturbation import score_perturbations
from gmarpp.training.execution import Execution
from gmarpp.training.module import ViTClassifier
from gmarpp.training.optim import Optimization

EXPLAINER = Explainer(
    methods=["gmarpp_l1", "rollout"], metrics=["average_drop", "insertion_auc", "deletion_auc", "road"], steps=4
)


def classifier(**options):
    torch.manual_seed(0)
    defaults = {"architecture": "test_vit", "num_classes": 3, "image_size": 32, "pretrained": False}
    return ViTClassifier(
        **defaults, model_args={"depth": 2}, optimizer=Optimization(lr=1e-3, layer_decay=1.0), **options
    )


def trainer(folder, *callbacks, **options):
    defaults = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    defaults |= {"enable_checkpointing": False, "max_epochs": 2}
    return L.Trainer(default_root_dir=folder, callbacks=list(callbacks), **(defaults | options))


def expected_metrics(model, images):
    """What the metrics are, from the public functions alone."""
    maps = gmarpp.explain(model, images, EXPLAINER.methods)
    scores = score_perturbations(model, images, maps.maps, maps.target, steps=4)
    expected = {}
    for method in EXPLAINER.methods:
        expected[f"attribution/{method}/average_drop"] = METRICS["average_drop"]()(scores.full, scores.kept[method])
        expected[f"attribution/{method}/insertion_auc"] = METRICS["insertion_auc"]()(
            scores.fractions, scores.insertion[method]
        )
    return {tag: value.item() for tag, value in expected.items()}


def test_a_dry_run_explains_one_image(tmp_path):
    monitor = AttributionMonitor(EXPLAINER, images=6)
    explained = []
    monitor.explainer = lambda network, batch: explained.append(len(batch["image"])) or EXPLAINER(network, batch)
    for option in ("names", "metrics", "score", "normalize", "signed_methods"):
        setattr(monitor.explainer, option, getattr(EXPLAINER, option))
    trainer(tmp_path, monitor, fast_dev_run=True).fit(classifier(), Squares())
    assert explained == [1]


def test_logs_the_metrics_of_the_same_images_at_every_validation(tmp_path):
    network, monitor = classifier(), AttributionMonitor(EXPLAINER, images=6, batch_size=4)
    run = trainer(tmp_path, monitor)
    run.validate(network, Squares(), verbose=False)
    squares = ColouredSquares(23, 3, seed=1)
    chosen = spread_over_classes(squares.labels.numpy(), 6)
    assert sorted(squares.labels[chosen].tolist()) == [0, 0, 1, 1, 2, 2]
    expected = expected_metrics(network.model, squares.images[chosen])
    for tag, value in expected.items():
        assert run.callback_metrics[tag].item() == pytest.approx(value, rel=1e-4), tag
    assert {f"attribution/{m}/{n}" for m in EXPLAINER.methods for n in EXPLAINER.metrics} < set(run.callback_metrics)
    assert run.callback_metrics["attribution/seconds"] > 0
    again = trainer(tmp_path, monitor)
    again.validate(network, Squares(), verbose=False)
    for tag in expected:
        assert again.callback_metrics[tag] == run.callback_metrics[tag]


def test_fits_as_without_it_and_draws(tmp_path):
    weights, logger = [], TensorBoardLogger(tmp_path, name="", version="run")
    for callbacks, loggers in (((), False), ((AttributionMonitor(EXPLAINER, images=6),), logger)):
        network = classifier()
        run = trainer(tmp_path, *callbacks, logger=loggers, accumulate_grad_batches=2, precision="bf16-mixed")
        L.seed_everything(0)
        run.fit(network, Squares())
        weights.append(torch.cat([parameter.detach().flatten() for parameter in network.parameters()]))
    assert torch.equal(*weights)
    events = EventAccumulator(str(tmp_path / "run")).Reload()
    pictures = {"attribution_maps/gmarpp_l1", "attribution_maps/rollout", "attribution/curves"}
    assert pictures <= set(events.Tags()["images"])
    logged = {name: events.Scalars(f"attribution/{name}/insertion_auc") for name in EXPLAINER.methods}
    for method, scalars in logged.items():
        steps = [event.step for event in scalars]
        assert steps == [event.step for event in events.Images(f"attribution_maps/{method}")] == [1, 3]
        # A run of its own, which gives the method's line its own color in the chart of the metric.
        line = EventAccumulator(str(tmp_path / "run" / method)).Reload()
        assert set(line.Tags()["scalars"]) == {f"attribution_by_metric/{metric}" for metric in EXPLAINER.metrics}
        found = line.Scalars("attribution_by_metric/insertion_auc")
        assert [(event.step, event.value) for event in found] == [(event.step, event.value) for event in scalars]


@pytest.mark.parametrize(("signed_maps", "against"), [("diverging", True), ("positive", False)])
def test_relevance_against_the_class_is_drawn_in_blue_unless_its_positive_part_is_asked_for(
    tmp_path, signed_maps, against
):
    gmarpp.register_method(Downwards())
    explainer = Explainer(methods=["downwards"], metrics=["sparseness"])
    logger = TensorBoardLogger(tmp_path, name="", version="run")
    monitor = AttributionMonitor(explainer, images=3, signed_maps=signed_maps)
    trainer(tmp_path, monitor, logger=logger).validate(classifier(), Squares(), verbose=False)
    (event,) = EventAccumulator(str(tmp_path / "run")).Reload().Images("attribution_maps/downwards")
    picture = np.asarray(Image.open(io.BytesIO(event.encoded_image_string)).convert("RGB")).astype(int)
    # The row of the maps; the row of the images has colors of its own.
    row = picture[3 * picture.shape[0] // 5 :]
    assert bool((row[..., 2] > row[..., 0] + 40).mean() > 0.01) is against
    assert (row[..., 0] > row[..., 2] + 40).mean() > 0.01


def test_checkpointing_and_early_stopping_monitor_it(tmp_path):
    tag = "attribution/gmarpp_l1/insertion_auc"
    best = ModelCheckpoint(tmp_path, "best", monitor=tag, mode="max", auto_insert_metric_name=False)
    stop = EarlyStopping(tag, mode="min", patience=1)
    monitor = AttributionMonitor(EXPLAINER, images=3)
    run = trainer(tmp_path, monitor, best, stop, max_epochs=30, enable_checkpointing=True)
    run.fit(classifier(), Squares())
    assert best.best_model_score.item() >= run.callback_metrics[tag].item()
    assert (tmp_path / "best.ckpt").exists()
    assert run.current_epoch < 30


def test_explains_the_averaged_weights(tmp_path):
    network = classifier()
    run = trainer(tmp_path, AttributionMonitor(EXPLAINER, images=6), AveragedWeights(decay=0.5))
    run.fit(network, Squares())
    # After fitting, the averaged weights are the module's own.
    squares = ColouredSquares(23, 3, seed=1)
    chosen = spread_over_classes(squares.labels.numpy(), 6)
    for tag, value in expected_metrics(network.model, squares.images[chosen]).items():
        assert run.callback_metrics[tag].item() == pytest.approx(value, rel=1e-4), tag


def test_is_off_with_one_option_and_skips_validations(tmp_path):
    run = trainer(tmp_path, AttributionMonitor(EXPLAINER, images=0))
    run.fit(classifier(), Squares())
    assert not any(tag.startswith("attribution") for tag in run.callback_metrics)
    logger = TensorBoardLogger(tmp_path, name="", version="sparse")
    trainer(tmp_path, AttributionMonitor(EXPLAINER, images=3, every_n_epochs=2), logger=logger, max_epochs=3).fit(
        classifier(), Squares()
    )
    events = EventAccumulator(str(tmp_path / "sparse")).Reload()
    assert [event.step for event in events.Scalars("attribution/rollout/deletion_auc")] == [2, 8]


def test_resumed_run_skips_the_same_validations(tmp_path):
    def fit(name, epochs, resume=None):
        logger = TensorBoardLogger(tmp_path, name="", version=name)
        monitor = AttributionMonitor(EXPLAINER, images=3, every_n_epochs=2)
        run = trainer(tmp_path, monitor, logger=logger, max_epochs=epochs)
        run.fit(classifier(), Squares(), ckpt_path=resume)
        return run

    fit("first", 1).save_checkpoint(tmp_path / "run.ckpt")
    fit("resumed", 3, tmp_path / "run.ckpt")
    events = EventAccumulator(str(tmp_path / "resumed")).Reload()
    assert [event.step for event in events.Scalars("attribution/rollout/deletion_auc")] == [8]


def test_a_resumed_run_can_be_judged_by_a_metric_of_a_validation_before(tmp_path):
    def fit(epochs, resume=None):
        best = ModelCheckpoint(tmp_path, "best", monitor="attribution/rollout/deletion_auc", mode="min")
        stopping = EarlyStopping("attribution/rollout/deletion_auc", patience=9)
        monitor = AttributionMonitor(EXPLAINER, images=3, every_n_epochs=3)
        run = trainer(tmp_path, monitor, best, stopping, max_epochs=epochs, enable_checkpointing=True)
        run.fit(classifier(), Squares(), ckpt_path=resume)
        return run

    first = fit(1)
    first.save_checkpoint(tmp_path / "run.ckpt")
    resumed = fit(2, tmp_path / "run.ckpt")
    assert resumed.current_epoch == 2
    for run in (first, resumed):
        value = run.callback_metrics["attribution/rollout/deletion_auc"].item()
        assert run.checkpoint_callback.best_model_score.item() == pytest.approx(value)


def test_monitors_a_network_that_recomputes_its_activations(tmp_path):
    values = []
    for recompute in (False, True):
        run = trainer(tmp_path, AttributionMonitor(EXPLAINER, images=3), max_epochs=1)
        run.fit(classifier(execution=Execution(gradient_checkpointing=recompute)), OrderedSquares())
        values.append([run.callback_metrics[f"attribution/{m}/insertion_auc"].item() for m in EXPLAINER.methods])
    assert values[0] == pytest.approx(values[1], rel=1e-4)


def test_what_cannot_be_monitored_says_so(tmp_path):
    with pytest.raises(ValueError, match="pointing_game cannot be monitored: the data has neither boxes nor masks"):
        trainer(tmp_path, AttributionMonitor(Explainer(metrics=["pointing_game"]), images=3)).validate(
            classifier(), Squares(), verbose=False
        )
    with pytest.raises(ValueError, match=r"AttributionMonitor\.images: expected a number of at least 0, got -1"):
        AttributionMonitor(images=-1)
