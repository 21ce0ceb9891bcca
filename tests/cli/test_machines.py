"""Several machines that share the images of one run, each started by torchrun."""

import os
import socket
import subprocess
import sys
from pathlib import Path

from fake_run import contents
from noise import write_noise

ROOT = Path(__file__).parents[2]
SHIPPED = ROOT / "checkpoints" / "vit_small_patch14_112.tiny_imagenet.safetensors"
PREDICT = [
    *("-m", "gmarpp", "predict", f"--ckpt_path={SHIPPED}", "--data=ImageFolder", "--data.root=noise"),
    *("--data.num_workers=0", "--data.batch_size=2", "--explain.methods=[rollout]", "--explain.metrics=[]"),
    *("--trainer.accelerator=cpu", "--trainer.devices=1"),
]


def start(folder, *arguments):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *arguments]
    return subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def test_two_machines_explain_as_one_does(tmp_path):
    write_noise(tmp_path / "noise")
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    torchrun = ["-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", f"--master-port={port}"]
    machines = [
        [*torchrun, "--master-addr=127.0.0.1", f"--node-rank={rank}", *PREDICT, "--trainer.num_nodes=2", "--output=two"]
        for rank in range(2)
    ]
    processes = [start(tmp_path, *each) for each in (*machines, [*PREDICT, "--output=one"])]
    for process in processes:
        output, _ = process.communicate()
        assert process.returncode == 0, output.decode()
    assert len(contents(tmp_path / "one")) > 10
    assert contents(tmp_path / "two") == contents(tmp_path / "one")
