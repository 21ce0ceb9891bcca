import copy
import inspect
import pickle

import matplotlib.pyplot as plt
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torchmetrics import MetricCollection

from gmarpp.metrics import METRICS, ROAD, AverageGain, AverageIncrease, IoU, functional

NAMES = list(METRICS)
IMAGES = 7


def batch(seed=0, count=IMAGES):
    """Everything any metric takes, with an image without an object and an undefined curve."""
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape):
        return torch.rand(*shape, generator=generator)

    given = {
        "full": rand(count),
        "kept": rand(count),
        "fractions": torch.tensor([0.0, 0.3, 0.6, 1.0]),
        "insertion": rand(count, 4),
        "deletion": rand(count, 4),
        "most_relevant_first": rand(count, 3),
        "least_relevant_first": rand(count, 3),
        "map_changes": rand(count, 3),
        "removed_relevance": rand(count, 3),
        "score_drops": rand(count, 3),
        "maps": rand(count, 4, 4),
        "masks": rand(count, 8, 8) > 0.6,
    }
    given["masks"][1] = False
    given["insertion"][2] = torch.nan
    return given


def part(given, images):
    return {name: value if name == "fractions" else value[images] for name, value in given.items()}


def arguments(name, given):
    return [given[parameter] for parameter in inspect.signature(METRICS[name]().update).parameters]


@pytest.mark.parametrize("name", NAMES)
def test_equals_its_functional_twin(name):
    given, metric = batch(), METRICS[name]()
    metric.update(*arguments(name, part(given, slice(0, 3))))
    metric.update(*arguments(name, part(given, slice(3, None))))
    twin = getattr(functional, name)
    torch.testing.assert_close(metric.compute(), twin(*arguments(name, given)))
    per_image = twin(*arguments(name, given), reduction="none")
    assert per_image.shape == (IMAGES,)
    torch.testing.assert_close(metric.compute(), per_image.nanmean())


@pytest.mark.parametrize("name", NAMES)
def test_torchmetrics_conventions(name):
    given, metric = arguments(name, batch()), METRICS[name]()
    assert metric.is_differentiable in (True, False)
    lower = ("average_drop", "deletion_auc", "infidelity", "max_sensitivity")
    directions = dict.fromkeys(lower, False) | {"sparseness": None}
    assert metric.higher_is_better is directions.get(name, True)
    assert metric.full_state_update is False
    with pytest.raises(RuntimeError, match="const"):
        metric.higher_is_better = None
    value = metric(*given)
    assert value.shape == ()
    assert metric.state_dict() == {}
    assert list(metric.parameters()) == []
    for twin in (metric.clone(), copy.deepcopy(metric), pickle.loads(pickle.dumps(metric))):
        assert twin.compute() == value
        twin.update(*given)
        assert twin.update_count == metric.update_count + 1
    metric.reset()
    metric.update(*given)
    assert metric.compute() == value
    for values in (None, [value, value]):
        figure, _ = metric.plot(values)
        assert figure.axes
        plt.close(figure)


@pytest.mark.parametrize("name", NAMES)
def test_differentiable_metrics_have_gradients(name):
    metric, given = METRICS[name](), batch()
    del given["insertion"], given["masks"]
    given |= {"insertion": torch.rand(IMAGES, 4), "masks": torch.ones(IMAGES, 8, 8, dtype=torch.bool)}
    floats = {key: value.requires_grad_() for key, value in given.items() if value.is_floating_point()}
    value = metric(*arguments(name, given | floats))
    assert value.requires_grad or not metric.is_differentiable


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(name, dtype):
    half = {key: value.to(dtype) if value.is_floating_point() else value for key, value in batch().items()}
    exact = {key: value.float() if value.is_floating_point() else value for key, value in half.items()}
    metric, expected = METRICS[name](), METRICS[name]()
    metric.update(*arguments(name, half))
    expected.update(*arguments(name, exact))
    assert metric.compute().dtype == torch.float32
    assert torch.equal(metric.compute(), expected.compute())


def test_collection_fed_once_per_batch_by_keyword():
    collection = MetricCollection({name: metric() for name, metric in METRICS.items()})
    first, second = batch(0), batch(1, 4)
    collection.update(**first)
    collection.update(**second)
    values = collection.compute()
    for name in NAMES:
        alone = METRICS[name]()
        alone.update(*arguments(name, first))
        alone.update(*arguments(name, second))
        assert values[name] == alone.compute(), name


def test_collection_keeps_metrics_apart_that_start_equal():
    # Nothing rises in the first batch: both sums are 0 with equal counts.
    collection = MetricCollection(
        [AverageIncrease(), AverageGain()],
    )
    collection.update(full=torch.tensor([0.5, 0.5]), kept=torch.tensor([0.1, 0.2]))
    collection.update(full=torch.tensor([0.5, 0.5]), kept=torch.tensor([0.75, 0.5]))
    values = collection.compute()
    assert (values["AverageIncrease"].item(), values["AverageGain"].item()) == (25, 12.5)


def test_collection_keeps_options_apart():
    maps, masks = torch.tensor([[[0.0, 1.0], [2.0, 4.0]]]), torch.tensor([[[0, 0], [0, 1]]])
    collection = MetricCollection({"low": IoU(threshold=0.4), "high": IoU(threshold=0.6), "mean": IoU()})
    collection.update(maps=maps, masks=1 - masks)
    collection.update(maps=maps, masks=masks)
    values = {name: value.item() for name, value in collection.compute().items()}
    assert values == pytest.approx({"low": (1 / 4 + 1 / 2) / 2, "high": (0 + 1) / 2, "mean": (1 / 4 + 1 / 2) / 2})
    roads = MetricCollection({order: ROAD(order) for order in ("most_relevant_first", "least_relevant_first")})
    same = torch.full((1, 2), 0.5)
    roads.update(most_relevant_first=same, least_relevant_first=same)
    roads.update(most_relevant_first=same, least_relevant_first=2 * same)
    values = {name: value.item() for name, value in roads.compute().items()}
    assert values == {"most_relevant_first": 0.5, "least_relevant_first": 0.75}


def test_nothing_seen_or_nothing_defined_is_nan():
    metric = METRICS["pointing_game"]()
    metric.update(torch.rand(2, 2, 2), torch.zeros(2, 4, 4))
    assert metric.compute().isnan()


def _rank(rank, folder):
    """A rank sees every other image, in batches of its own."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    given, collection = batch(), MetricCollection({name: metric() for name, metric in METRICS.items()})
    for images in torch.arange(rank, IMAGES, 2).split(2 + rank):
        collection.update(**part(given, images))
    torch.save(collection.compute(), folder / f"rank{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_equal_one(tmp_path):
    mp.spawn(_rank, (tmp_path,), nprocs=2)
    ranks = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2)]
    given = batch()
    for name in NAMES:
        alone = METRICS[name]()
        alone.update(*arguments(name, given))
        for values in ranks:
            torch.testing.assert_close(values[name], alone.compute(), rtol=1e-6, atol=1e-6)
