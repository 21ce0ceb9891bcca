"""What gmarpp does, in a few minutes and offline: explains photographs, then fine-tunes and watches the explanations.

    make demo

Writes to results/demo and logs. The photographs are scikit-image's `chelsea` (Stefan van der Walt) and `coffee` (Rachel
Michetti), both CC0; the digits are scikit-learn's, on scikit-learn's two sample photographs.
"""

import csv
import logging
import shutil
import time
from pathlib import Path

import torch
from PIL import Image
from skimage import data
from torchvision.transforms.v2 import functional as TF

import gmarpp
from gmarpp.cli.explain import explain_main
from gmarpp.cli.train import train_main
from gmarpp.data import EvaluationTransform, Preprocessing
from gmarpp.figures import comparison_figure, figure_bytes

CHECKPOINT = "checkpoints/vit_small_patch14_112.tiny_imagenet.safetensors"
RESULTS = Path("results/demo")
METHODS = ["token_relevance", "gmarpp_balanced", "gmarpp_l1", "legrad", "rollout"]
PAIR = "cat and coffee"


def write_photographs(folder: Path) -> None:
    """Write the two photographs, cropped to what they are about, and the two side by side."""
    cat = Image.fromarray(data.chelsea()).crop((80, 0, 380, 300)).resize((448, 448), Image.Resampling.LANCZOS)
    coffee = Image.fromarray(data.coffee()).crop((100, 0, 500, 400)).resize((448, 448), Image.Resampling.LANCZOS)
    pair = Image.new("RGB", (896, 448))
    pair.paste(cat, (0, 0))
    pair.paste(coffee, (448, 0))
    folder.mkdir(parents=True, exist_ok=True)
    for name, picture in (("cat", cat), ("coffee", coffee), (PAIR, pair)):
        picture.save(folder / f"{name}.png")


def explain_two_classes(photographs: Path, output: Path) -> dict[str, list[float]]:
    """Explain the pair as a cat and as coffee; give each method's share of positive relevance on the coffee's half."""
    model = gmarpp.load_model(CHECKPOINT)
    transform = EvaluationTransform(Preprocessing.of(model))
    pictures = {name: TF.pil_to_tensor(Image.open(photographs / f"{name}.png")) for name in ("cat", "coffee", PAIR)}
    # The network takes squares: the pair is squeezed for it, and shown as it is.
    squares = [TF.resize(picture, [448, 448], antialias=True) for picture in pictures.values()]
    images = torch.stack([transform(square)["image"] for square in squares])[[0, 1, 2, 2]]
    targets = ["Egyptian cat", "espresso", "Egyptian cat", "espresso"]
    explanation = gmarpp.explain(model, images, METHODS, targets)
    probabilities = explanation.logits.softmax(dim=1).gather(1, explanation.target[:, None])[:, 0]
    figure = comparison_figure(
        images=[pictures[name] / 255 for name in ("cat", "coffee", PAIR, PAIR)],
        maps={method: list(maps) for method, maps in explanation.maps.items()},
        names=targets,
        probabilities=probabilities.tolist(),
        signed_methods=explanation.signed_methods,
    )
    output.mkdir(parents=True, exist_ok=True)
    (output / "two_classes.png").write_bytes(figure_bytes(figure))
    halves = {}
    for method, maps in explanation.maps.items():
        positive = maps[2:].clamp_min(0)
        shares = positive[:, :, 4:].sum(dim=(1, 2)) / positive.sum(dim=(1, 2))
        halves[method] = shares.tolist()
    return halves


def last_scalars(folder: Path) -> dict[str, float]:
    """Give the last value of every scalar that a training run logged."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = max(folder.glob("version_*"), key=lambda each: each.stat().st_mtime)
    events = EventAccumulator(str(run)).Reload()
    return {tag: events.Scalars(tag)[-1].value for tag in events.Tags()["scalars"]}


def main() -> None:
    """Explain, fine-tune, and say where everything is."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    started = time.perf_counter()
    print("\n1/2  Explaining photographs with the shipped checkpoint\n")
    shutil.rmtree(RESULTS, ignore_errors=True)
    photographs = RESULTS / "photographs"
    write_photographs(photographs)
    options = ["--trainer.accelerator", "cpu", "--data", "ImageFolder", "--data.root", str(photographs)]
    options += ["--data.num_workers", "0", "--explain.methods", f"[{', '.join(METHODS)}]"]
    explain_main(["predict", "--ckpt_path", CHECKPOINT, "--output", str(RESULTS / "explained"), *options])
    halves = explain_two_classes(photographs, RESULTS)

    print("\n2/2  Fine-tuning the shipped checkpoint on handwritten digits\n")
    train_main(["fit", "--config", "configs/digits.yaml"])
    scalars = last_scalars(Path("logs"))

    with (RESULTS / "explained" / "summary.csv").open() as table:
        summary = {(row["method"], row["metric"]): float(row["mean"]) for row in csv.DictReader(table)}
    labels = gmarpp.METHOD_LABELS
    print("\nThe picture with a cat on the left and coffee on the right, explained as either:")
    print(f"\n  {'relevance on the right half':30}{'as Egyptian cat':>18}{'as espresso':>14}")
    for method, (cat, coffee) in halves.items():
        print(f"  {labels[method]:30}{cat:18.0%}{coffee:14.0%}")
    print(f"\n  {'three photographs':30}{'insertion AUC (+)':>18}{'deletion AUC (-)':>18}")
    for method in METHODS:
        insertion, deletion = summary[method, "insertion_auc"], summary[method, "deletion_auc"]
        print(f"  {labels[method]:30}{insertion:18.3f}{deletion:18.3f}")
    print(f"\n  Digits: {scalars['val/accuracy']:.0%} of the validation images after fine-tuning")
    print("\nPictures")
    print(f"  {RESULTS / 'two_classes.png'}          methods against classes: start here")
    print(f"  {RESULTS / 'explained' / 'report.html'}   everything about the photographs; open it in a browser")
    print("\nTraining curves, attribution metrics and maps of every validation")
    print("  .venv/bin/tensorboard --logdir logs")
    print(f"\nTook {(time.perf_counter() - started) / 60:.1f} minutes.")


if __name__ == "__main__":
    main()
