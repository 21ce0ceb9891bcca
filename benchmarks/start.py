"""How long a command takes from its start to its first batch: seconds, CPU seconds, and modules imported.

    python benchmarks/start.py [--repeats 3] [--tree FOLDER]

`gmarpp predict` explains photographs of noise with the shipped checkpoint, and `gmarpp fit` begins to fine-tune it on
handwritten digits, whose data it makes once; its first batch is one of the validation that comes before. Each run is a
process of its own that ends with its first batch; files are in the system's cache after the first round, which does not
count. `--tree` measures another working tree of the repository, by turns with this one. What takes long:

    python -X importtime explain.py predict --help_all 2>&1 >/dev/null | sort -t'|' -k1.13n | tail
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch.callbacks import Callback
from PIL import Image

ROOT = Path(__file__).parents[1]
CHECKPOINT = "checkpoints/vit_small_patch14_112.tiny_imagenet.safetensors"


class FirstBatch(Callback):
    """Prints what was used up to the first batch, and ends the process."""

    def on_predict_batch_start(self, *_: Any) -> None:
        """Print and end."""
        used = resource.getrusage(resource.RUSAGE_SELF)
        cpu = used.ru_utime + used.ru_stime
        print(json.dumps([time.time() - float(os.environ["STARTED"]), cpu, len(sys.modules)]), flush=True)
        os._exit(0)

    # Lightning validates two batches before it trains.
    on_validation_batch_start = on_predict_batch_start


def run(tree: Path, arguments: list[str], folder: Path) -> list[float]:
    """Run a command of a working tree up to its first batch; return seconds, CPU seconds and modules."""
    paths = os.pathsep.join([str(tree), str(ROOT / "benchmarks")])
    environment = {**os.environ, "PYTHONPATH": paths, "STARTED": str(time.time())}
    command = [sys.executable, "-m", "gmarpp", *arguments, "--trainer.callbacks+=start.FirstBatch"]
    ended = subprocess.run(command, cwd=folder, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    used: list[float] = json.loads(ended.stdout.splitlines()[-1])
    return used


def main() -> None:
    """Measure and print JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tree", type=Path, help="another working tree of the repository")
    options = parser.parse_args()
    trees = {"here": ROOT} | ({} if options.tree is None else {"there": options.tree.absolute()})
    report: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "photos").mkdir()
        noise = np.random.default_rng(0).integers(0, 256, (8, 160, 200, 3), dtype=np.uint8)
        for number, pixels in enumerate(noise):
            Image.fromarray(pixels).save(folder / "photos" / f"{number}.jpg")
        shared = ["--ckpt_path", str(ROOT / CHECKPOINT), "--data", "ImageFolder", "--data.root", "photos"]
        small = ["--data.images_per_class=32", "--trainer.val_check_interval=1", f"--model.weights={ROOT / CHECKPOINT}"]
        commands = {
            "predict": ["predict", *shared, "--data.num_workers=0", "--output=results"],
            "fit": ["fit", f"--config={ROOT / 'configs/digits.yaml'}", "--data.num_workers=0", *small],
        }
        for command, arguments in commands.items():
            rounds: dict[str, list[list[float]]] = {tree: [] for tree in trees}
            for turn in range(options.repeats + 1):
                for tree, path in trees.items():
                    used = run(path, arguments, folder)
                    rounds[tree] += [used] if turn else []
            names = ("seconds", "CPU seconds", "modules")
            report[command] = {
                tree: {
                    name: round(statistics.median(values), 2)
                    for name, values in zip(names, zip(*runs, strict=True), strict=True)
                }
                for tree, runs in rounds.items()
            }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
