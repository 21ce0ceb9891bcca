"""Training from the command line to the checkpoint, in one process and in two."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from noise import write_noise
from small_model import MODEL

from gmarpp.cli.train import train_main
from gmarpp.network.files.load import describe_weights, load_model

ROOT = Path(__file__).parents[2]
SHIPPED = ROOT / "checkpoints" / "vit_small_patch14_112.tiny_imagenet.safetensors"
# train.py that also knows the tests' data modules; a file, since DDP starts its other ranks from it
SCRIPT = """
import signal
import lightning
import squares
import train

class Losses(lightning.Callback):
    # loggers have those of rank 0 alone
    def on_train_batch_end(self, trainer, module, outputs, *_):
        with open(f"losses{trainer.global_rank}.txt", "a") as file:
            print(outputs["loss"].item(), file=file)

class Stall(lightning.Callback):
    # waits to be killed, which happens before where the test is quick
    def on_train_batch_end(self, trainer, *_):
        while trainer.global_step == 20:
            signal.pause()

if __name__ == "__main__":
    train.train_main()
"""
PLAIN = [
    "--trainer.accelerator=cpu",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
    "--trainer.logger=CSVLogger",
    "--trainer.logger.save_dir=csv",
    "--trainer.log_every_n_steps=1",
]


def start(folder, *arguments, **options):
    """A training process of its own, as DDP's launcher and signals need it."""
    (folder / "script.py").write_text(SCRIPT)
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "script.py", *arguments]
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options
    )


def logged(folder, name):
    rows = [line.split(",") for line in next(folder.glob("csv/**/metrics.csv")).read_text().splitlines()]
    column = rows[0].index(name)
    return [float(row[column]) for row in rows[1:] if row[column]]


def test_shipped_checkpoint_is_what_its_readme_says():
    assert describe_weights(SHIPPED).sha256 in (SHIPPED.parent / "README.md").read_text()
    model = load_model(SHIPPED)
    assert len(model.classes) == len(model.class_names) == model.num_classes == 200
    assert model.classes == tuple(sorted(model.classes))
    assert model.class_names[model.classes.index("n02124075")] == "Egyptian cat"


def test_digits_recipe_trains_validates_and_keeps_its_checkpoints(tmp_path, monkeypatch):
    pytest.importorskip("sklearn")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    (tmp_path / "checkpoints").symlink_to(SHIPPED.parent)
    options = ["--data.train_images=8", "--data.val_images=2", "--data.batch_size=4", "--data.num_workers=0"]
    short = [
        "--trainer.limit_train_batches=3",
        "--trainer.val_check_interval=3",
        "--trainer.accelerator=cpu",
        "--trainer.enable_progress_bar=false",
    ]
    run = train_main(["fit", "--config", str(ROOT / "configs/digits.yaml"), *options, *short])
    assert run.trainer.global_step == 3
    model = load_model(tmp_path / "logs/version_0/checkpoints/last.ckpt")
    assert model.class_names[:2] == ("zero", "one")
    # the shipped weights arrived: three steps move them little, random ones would be far away
    shipped = load_model(SHIPPED).blocks[5].mlp.fc1.weight
    assert torch.cosine_similarity(model.blocks[5].mlp.fc1.weight.flatten(), shipped.flatten(), dim=0) > 0.99


def test_two_processes_equal_one(tmp_path):
    """Same effective batch: same rates, losses and validation metrics, every image counted once (23 on 2 ranks)."""
    both = [
        "fit",
        "--data=OrderedSquares",
        *MODEL,
        *PLAIN,
        "--trainer.max_epochs=2",
        "--model.optimizer.lr_batch_size=8",
    ]
    both += ["--trainer.callbacks=script.Losses"]
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    two.mkdir()
    ranks = ["--trainer.devices=2", "--trainer.strategy=ddp", "--data.batch_size=4"]
    for process in (start(one, *both, "--data.batch_size=8"), start(two, *both, *ranks)):
        output, _ = process.communicate()
        assert process.returncode == 0, output.decode()
    assert b"Effective batch size 8 = 4 x 2 devices" in output
    assert logged(two, "train/lr") == pytest.approx(logged(one, "train/lr"))
    expected, *shares = (
        [float(line) for line in file.read_text().split()]
        for file in (one / "losses0.txt", two / "losses0.txt", two / "losses1.txt")
    )
    assert [sum(pair) / 2 for pair in zip(*shares, strict=True)] == pytest.approx(expected, rel=1e-4)
    assert len(expected) == 6
    for name in ("val/loss", "val/accuracy", "val/calibration_error"):
        assert logged(two, name) == pytest.approx(logged(one, name), rel=1e-4), name
    assert len(logged(one, "val/loss")) == 2


@pytest.fixture
def two_ranks(tmp_path):
    """Two ranks with a loader process each, begun to train, in a process group of their own."""
    arguments = [
        "fit", *MODEL, *PLAIN, "--data=ImageFolder", f"--data.root={write_noise(tmp_path / 'noise')}",
        "--data.labelled=true", "--data.batch_size=2", "--data.num_workers=1", "--trainer.max_epochs=100000",
        "--trainer.limit_val_batches=0", "--trainer.devices=2", "--trainer.strategy=ddp",
        "--trainer.callbacks=script.Losses",
    ]  # fmt: skip
    process = start(tmp_path, *arguments, start_new_session=True)
    try:
        while not (tmp_path / "losses1.txt").exists() and process.poll() is None:
            time.sleep(0.05)
        (tmp_path / "losses0.txt").touch()
        yield process, arguments
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def other_rank(process):
    """The process that rank 0 started."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return next(
        int(child)
        for child in children
        if b"script.py" in Path(f"/proc/{child}/cmdline").read_bytes()
        and b"LOCAL_RANK=1" in Path(f"/proc/{child}/environ").read_bytes()
    )


def test_ranks_stop_at_the_same_step_after_a_signal_and_resume(two_ranks, tmp_path, monkeypatch):
    process, arguments = two_ranks
    os.killpg(process.pid, signal.SIGTERM)
    output = process.communicate()[0].decode()
    assert process.returncode == 143, output
    assert output.count("stopped by SIGTERM") == 1
    assert "Traceback" not in output
    steps, others = ((tmp_path / f"losses{rank}.txt").read_text().count("\n") for rank in (0, 1))
    (last,) = tmp_path.rglob("last.ckpt")
    assert torch.load(last, weights_only=True)["global_step"] == steps == others

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    arguments.remove("--trainer.callbacks=script.Losses")
    one = ["--trainer.devices=1", "--trainer.strategy=auto", "--data.num_workers=0"]
    run = train_main(
        [*arguments, *one, "--ckpt_path=last", "--trainer.max_epochs=-1", f"--trainer.max_steps={steps + 2}"]
    )
    assert run.trainer.global_step == steps + 2


def test_run_ends_with_one_line_when_a_rank_is_killed(two_ranks):
    process, _ = two_ranks
    other = other_rank(process)
    os.kill(other, signal.SIGKILL)
    output = process.communicate()[0].decode()
    assert process.returncode == 1, output
    assert "Traceback" not in output
    (line,) = [line for line in output.splitlines() if line.startswith("error: ")]
    assert line == f"error: rank 1 (process {other}) was ended from outside by SIGKILL: the run cannot go on without it"


def test_killed_run_loses_nothing_but_the_steps_since_its_last_checkpoint(tmp_path, monkeypatch):
    steps = 30
    arguments = [
        "fit", *MODEL, "--model.drop_path=0.2", "--model.mixing.mixup=0.8", "--model.optimizer.lr=1e-2",
        "--data=ImageFolder", f"--data.root={write_noise(tmp_path / 'noise')}", "--data.labelled=true",
        "--data.batch_size=4", "--data.num_workers=0", "--trainer.accelerator=cpu", "--trainer.logger=false",
        "--trainer.enable_progress_bar=false", f"--trainer.max_steps={steps}",
        "--last_checkpoint.every_n_train_steps=8",
    ]  # fmt: skip
    (tmp_path / "killed").mkdir()
    process = start(tmp_path / "killed", *arguments, "--trainer.callbacks=script.Stall")
    last = tmp_path / "killed/logs/checkpoints/last.ckpt"
    while not last.exists() and process.poll() is None:
        time.sleep(0.01)
    process.kill()
    output, _ = process.communicate()
    assert process.returncode == -signal.SIGKILL, output.decode()

    monkeypatch.setattr(sys, "argv", ["train.py"])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        monkeypatch.chdir(tmp_path)
        whole = train_main(arguments)
        monkeypatch.chdir(tmp_path / "killed")
        assert 0 < torch.load(last, weights_only=True)["global_step"] <= 20
        resumed = train_main([*arguments, f"--ckpt_path={last}"])
    finally:
        torch.set_num_threads(threads)
    assert whole.trainer.global_step == resumed.trainer.global_step == steps
    for name, value in whole.model.model.state_dict().items():
        assert torch.equal(value, resumed.model.model.state_dict()[name]), name
