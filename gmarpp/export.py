"""Export of trained networks: `python -m gmarpp.export --ckpt_path best.ckpt --output model.onnx`."""

import logging
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import nn

from gmarpp.command import run_function
from gmarpp.files import atomic_file
from gmarpp.network.files.load import build_network, describe_weights
from gmarpp.network.files.save import describe_model, save_weights
from gmarpp.network.preprocessing import get_image_size

logger = logging.getLogger(__name__)


def export(ckpt_path: str, output: str, architecture: str | None = None) -> None:
    """Write a trained network as a plain timm file or for ONNX runtimes, with its classes and preprocessing.

    Args:
        ckpt_path: anything that `gmarpp.load_model` reads.
        output: the file to write; its suffix decides, `.safetensors` or `.onnx`.
        architecture: timm's name of the network, for files that do not record it.

    Raises:
        ValueError: the output has another suffix, or the checkpoint cannot be read.
        FileNotFoundError: there is no such checkpoint.
        ModuleNotFoundError: the packages that ONNX needs are not installed.
        OSError: the output cannot be written.
    """
    writers = {".safetensors": save_weights, ".onnx": save_onnx}
    suffix = Path(output).suffix
    if suffix not in writers:
        raise ValueError(f"--output {output}: expected the suffix {' or '.join(writers)}, got {suffix or 'none'}")
    weights = describe_weights(ckpt_path, architecture)
    weights.require_timm()
    writers[suffix](build_network(weights), output)
    logger.info("%s: %.1f MB", output, Path(output).stat().st_size / 1e6)


def save_onnx(model: nn.Module, path: str | Path) -> None:
    """Write a network for ONNX runtimes: from `images` (batch, 3, H, W), normalized, to `logits` (batch, classes).

    The batch size is free. The model's metadata is that of the safetensors file: classes and preprocessing as JSON.
    The file appears under its name only when it is complete.

    Args:
        model: a network from `load_model`, in evaluation mode.
        path: the file to write.

    Raises:
        ModuleNotFoundError: the packages of the extra `onnx` are not installed.
        ValueError: the weights exceed the 2 GiB that one ONNX file can hold.
    """
    missing = [name for name in ("onnx", "onnxscript") if find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(f"ONNX needs {' and '.join(missing)}: pip install 'gmarpp[onnx]'")
    size = sum(value.numel() * value.element_size() for value in model.state_dict().values())
    if size >= 1 << 31:
        raise ValueError(f"ONNX files hold up to 2 GiB: expected fewer weights, got {size / (1 << 30):.1f} GiB")
    program = torch.onnx.export(
        model,
        # With a batch of one, the exporter would fix the batch size at one.
        (torch.zeros(2, 3, *get_image_size(model)),),
        input_names=["images"],
        output_names=["logits"],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        dynamo=True,
        verbose=False,
    )
    assert program is not None
    program.model.metadata_props.update(describe_model(model))
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(Path(path)) as file:
        file.write(program.model_proto.SerializeToString())


def main(args: list[str] | None = None) -> None:
    """Run the command line; a user's mistake ends with one line on stderr and a status other than 0."""
    run_function(export, args)


if __name__ == "__main__":
    logging.basicConfig(format="%(message)s")
    logger.setLevel(logging.INFO)
    main()
