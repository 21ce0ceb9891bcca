import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from callbacks import foreign
from callbacks.test_monitor import EXPLAINER, classifier, trainer
from callbacks.test_monitor_anywhere import by_hand
from squares import Squares

from gmarpp.callbacks import AttributionMonitor


def values(run):
    return {tag: value.item() for tag, value in run.callback_metrics.items() if not tag.endswith("seconds")}


def curves(monitor):
    return {
        kind: {method: [*each.mean().mean.tolist(), each.n] for method, each in sums.items()}
        for kind, sums in monitor._curves.items()
    }


TWO_PROCESSES = """
import json, sys
sys.path.insert(0, {tests!r})
from pathlib import Path
import torch
from callbacks import foreign
from callbacks.test_monitor_anywhere import monitor
from callbacks.test_monitor_ranks import *
from torch.utils.data import DataLoader, TensorDataset

if __name__ == "__main__":
    folder, options = Path({folder!r}), dict(devices=2, strategy="ddp")
    ours = AttributionMonitor(EXPLAINER, images=7)
    first = trainer(folder, ours, **options)
    first.validate(classifier(), Squares(), verbose=False)
    shared = values(first), curves(ours)
    module, loader, _, _ = foreign.own_net(folder)
    second = trainer(folder, monitor(), **options)
    second.fit(module, loader, loader)
    if second.is_global_zero:
        torch.save(module.net.state_dict(), folder / "net.pt")
        (folder / "logged.json").write_text(json.dumps((*shared, values(second))))
    try:
        trainer(folder, monitor(images=2), **options).validate(module, DataLoader(TensorDataset(*foreign.samples(1))))
    except ValueError as error:
        (folder / f"error{{second.global_rank}}.txt").write_text(str(error))
"""


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    script = folder / "run.py"
    script.write_text(TWO_PROCESSES.format(tests=str(Path(__file__).parents[1]), folder=str(folder)))
    done = subprocess.run([sys.executable, str(script)], check=True, cwd=folder, stderr=subprocess.PIPE)
    assert b"sync_dist" not in done.stderr
    return folder


def test_two_processes_equal_one(two_processes, tmp_path):
    shared, shared_curves, _ = json.loads((two_processes / "logged.json").read_text())
    monitor = AttributionMonitor(EXPLAINER, images=7)
    run = trainer(tmp_path, monitor)
    run.validate(classifier(), Squares(), verbose=False)
    alone = {tag: value for tag, value in values(run).items() if tag.startswith("attribution")}
    assert len(alone) == 8
    for tag, value in alone.items():
        assert shared[tag] == pytest.approx(value, rel=1e-5), tag
    for kind, method in (("insertion", "gmarpp_l1"), ("deletion", "rollout")):
        np.testing.assert_allclose(shared_curves[kind][method], curves(monitor)[kind][method], rtol=1e-5)


def test_two_processes_of_a_foreign_module_log_what_the_functions_say_by_hand(two_processes, tmp_path):
    _, _, logged = json.loads((two_processes / "logged.json").read_text())
    _, _, network, images = foreign.own_net(tmp_path)
    network.load_state_dict(torch.load(two_processes / "net.pt", weights_only=True))
    for tag, value in by_hand(network, images).items():
        assert logged[tag] == pytest.approx(value, rel=1e-4), tag


def test_fewer_images_than_processes_is_an_error_on_all_of_them(two_processes):
    for rank in (0, 1):
        message = (two_processes / f"error{rank}.txt").read_text()
        assert message.startswith("the monitor has no images on some of the 2 processes: validate on at least")
