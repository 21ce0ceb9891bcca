"""The help that fits a screen; all of it is known without torch."""

import textwrap
from collections.abc import Iterable
from dataclasses import dataclass

from gmarpp.entry_points import announced
from gmarpp.labels import METHOD_LABELS, METRIC_LABELS

_WIDTH = 100
_INDENT = 36
_TRAINER_OPTIONS = {
    "--trainer.accelerator NAME": "cpu, gpu, or auto, which takes the fastest there is (auto)",
    "--trainer.devices N": "number of devices, or auto (auto)",
    "--trainer.precision NAME": "32-true, bf16-mixed, … (32-true)",
}
_CONFIG = {"--config FILE": "options from a file, several times if wanted; later ones win"}
_DATA = {
    "--data CLASS": "ImageFolder, Table, HubDataset, TinyImageNet, Digits, or yours",
    "--data.NAME VALUE": "an option of the data module: --data.root, --data.batch_size, …",
}
_CHECKPOINT = {"--ckpt_path FILE": "the network: .ckpt, .safetensors, .pth, or a folder of the Hub"}
_NETWORK = {"--model NAME|CLASS": "timm's or hf-hub: name, or your class, if the file names none"}
_ARCHITECTURE = {"--architecture FUNCTION": "describes a network of no known family: my_code.describe"}


@dataclass(frozen=True)
class Command:
    """One command of the command line.

    Attributes:
        summary: what it does, in a line.
        usage: what follows its name.
        options: its main options with their meaning and, in brackets, their default.
        example: a command line that works.
        every_option: whether it has more than its main options.
    """

    summary: str
    usage: str
    options: dict[str, str]
    example: str
    every_option: bool = True


def _evaluation(images: str, example: str) -> Command:
    return Command(
        summary=f"evaluate a trained network on the {images} images",
        usage="--ckpt_path FILE --data CLASS [options]",
        options={**_CHECKPOINT, **_NETWORK, **_CONFIG, **_DATA, **_TRAINER_OPTIONS},
        example=example,
    )


COMMANDS = {
    "fit": Command(
        summary="train, with maps and their faithfulness at every validation",
        usage="--config FILE [options]",
        options={
            **_CONFIG,
            **_DATA,
            "--model.architecture NAME": "timm's name of the network",
            "--model.task NAME": "multiclass, binary, multilabel or regression (multiclass)",
            "--model.num_classes N": "classes, labels or values of the data (200)",
            "--model.weights FILE": "start from this file; timm's weights from the Hub without it",
            "--model.optimizer.lr RATE": "peak learning rate of the head (0.00025)",
            "--model.head_only true": "train the head alone (false)",
            "--trainer.max_epochs N": "epochs to train",
            **_TRAINER_OPTIONS,
            "--trainer.default_root_dir DIR": "folder of logs and checkpoints (logs)",
            "--checkpoint.monitor METRIC": "keep the checkpoint that is best by it (val/accuracy)",
            "--ckpt_path FILE": "go on with an interrupted run: a .ckpt, or last for the newest",
        },
        example="gmarpp configs configs && gmarpp fit --config configs/vit_small_tiny_imagenet.yaml",
    ),
    "validate": _evaluation("validation", "gmarpp validate --ckpt_path best.ckpt --data TinyImageNet --data.root data"),
    "test": _evaluation("test", "gmarpp test --ckpt_path best.ckpt --data Digits"),
    "predict": Command(
        summary="explain images: maps, overlays, metrics and a report",
        usage="--ckpt_path FILE --data CLASS [options]",
        options={
            **_CHECKPOINT,
            **_NETWORK,
            **_ARCHITECTURE,
            **_CONFIG,
            **_DATA,
            "--output DIR": "folder of the results (results/NAME OF THE CHECKPOINT)",
            "--resume": "go on with an interrupted run in the same folder",
            "--overwrite": "replace the run in the same folder",
            "--explain.methods '[NAME, …]'": "methods (token_relevance, gmarpp_balanced, …)",
            "--explain.metrics '[NAME, …]'": "metrics; [] for maps alone, about fifty times faster",
            "--explain.target CLASS": "predicted, label, or classes by name or index (predicted)",
            "--explain.steps N": "steps of the insertion and deletion curves (28)",
            "--explain.baseline NAME": "what replaces removed patches: blur, mean, black, drop (blur)",
            "--write.overlays original": "draw maps on whole pictures; false draws none (true: the input)",
            **_TRAINER_OPTIONS,
        },
        example="gmarpp predict --ckpt_path best.ckpt --data ImageFolder --data.root photos --output results/photos",
    ),
    "overlays": Command(
        summary="draw the overlays of a run of predict, in colors of your choice",
        usage="--run DIR [options]",
        options={
            "--run DIR": "what was --output of a complete run",
            "--colormap NAME": "inferno, magma, plasma, viridis, cividis, turbo, jet (inferno)",
            "--opacity SHARE": "share of the map's colors, 0 to 1 (0.5)",
            "--signed_maps NAME": "diverging, or positive, only what is for the class (diverging)",
        },
        example="gmarpp overlays --run results/photos --colormap viridis",
    ),
    "sanity": Command(
        summary="check that maps depend on what the network has learned",
        usage="--ckpt_path FILE --data CLASS [options]",
        options={
            **_CHECKPOINT,
            **_NETWORK,
            **_ARCHITECTURE,
            **_CONFIG,
            **_DATA,
            "--output DIR": "folder of sanity.csv and sanity.png (results/sanity)",
            "--methods '[NAME, …]'": "methods (all but gmarpp_sum, gmarpp_balanced, token_relevance)",
            "--images N": "number of images (64)",
            "--seed N": "of the random parameters (0)",
        },
        example="gmarpp sanity --ckpt_path best.ckpt --data TinyImageNet --data.root data --output results/sanity",
    ),
    "export": Command(
        summary="write a trained network as a .safetensors or .onnx file",
        usage="--ckpt_path FILE --output FILE [options]",
        options={
            **_CHECKPOINT,
            "--output FILE": "the file to write; its suffix decides, .safetensors or .onnx",
            "--architecture NAME": "timm's name of the network, where the file does not name it",
        },
        example="gmarpp export --ckpt_path best.ckpt --output model.onnx",
    ),
    "push": Command(
        summary="push a trained network and its model card to the Hugging Face Hub",
        usage="--ckpt_path FILE --repo OWNER/NAME [options]",
        options={
            **_CHECKPOINT,
            "--repo OWNER/NAME": "the repository, which is made where it is missing",
            "--card FILE": "the model card (the one beside the checkpoint, or a short one)",
            "--private true": "make a missing repository private (false)",
            "--message TEXT": "of the commit (Add the network)",
            "--architecture NAME": "timm's name of the network, where the file does not name it",
        },
        example="gmarpp push --ckpt_path best.ckpt --repo you/vit-small-tiny-imagenet",
    ),
    "configs": Command(
        summary="list the shipped configurations, or copy them into a folder",
        usage="[FOLDER]",
        options={"FOLDER": "where to copy them; files that exist there are kept"},
        example="gmarpp configs configs",
        every_option=False,
    ),
}


def overview() -> str:
    """Return the page of `gmarpp --help`."""
    lines = [
        "usage: gmarpp COMMAND [options]",
        "",
        "Fine-tune Vision Transformers, see what they look at, and measure whether that is true.",
        "",
        "commands:",
        *(f"  {name:<10}{command.summary}" for name, command in COMMANDS.items()),
        "",
        *_names("methods", (*METHOD_LABELS, *announced("gmarpp.methods"))),
        *_names("metrics", (*METRIC_LABELS, *announced("gmarpp.metrics"))),
        "",
        "options:",
        "  --help     this page; with a command, its main options and an example",
        "  --version  the version of gmarpp",
        "",
        "example:",
        f"  {COMMANDS['predict'].example}",
    ]
    return "\n".join(lines)


def page(name: str) -> str:
    """Return the page of `gmarpp COMMAND --help`."""
    command = COMMANDS[name]
    lines = [
        f"usage: gmarpp {name} {command.usage}",
        "",
        f"{command.summary[0].upper()}{command.summary[1:]}.",
        "",
        "main options:",
        *(f"  {option:<{_INDENT - 3}} {meaning}" for option, meaning in command.options.items()),
        "",
        "example:",
        f"  {command.example}",
    ]
    if command.every_option:
        lines += ["", f"gmarpp {name} --help_all prints every option."]
    return "\n".join(lines)


def _names(heading: str, names: Iterable[str]) -> list[str]:
    return textwrap.wrap(
        ", ".join(dict.fromkeys(names)), _WIDTH, initial_indent=f"{heading}:  ", subsequent_indent=" " * 10
    )
