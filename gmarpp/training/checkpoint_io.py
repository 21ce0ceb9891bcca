"""Reading and writing of training checkpoints: no code runs, and the last complete one stays, whatever happens."""

import io
import pickle
import re
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import Tensor
from typing_extensions import override

from gmarpp.files import atomic_file, remove_leftovers
from gmarpp.network.files.safe_reading import load_tensors

# What Lightning takes for granted in a checkpoint, by its type.
PARTS = {
    "pytorch-lightning_version": str,
    "state_dict": dict,
    "epoch": int,
    "global_step": int,
    "loops": dict,
    "callbacks": dict,
    "optimizer_states": list,
    "lr_schedulers": list,
    "hyper_parameters": dict,
}


class AtomicCheckpointIO(TorchCheckpointIO):
    """Reads tensors and plain values alone, and gives a written file its name when the disk has all of it.

    Lightning writes to the system's temporary folder and moves the file. Where that is another file system, moving is
    copying: a full disk or a killed process then ends the old checkpoint, too. What killed processes left is removed
    when the next one saves beside it, or in the folder of another version of the run.

    By itself Lightning unpickles, and so runs, whatever code a checkpoint from a web address holds, and any other's if
    the environment asks for it.
    """

    def __init__(self) -> None:
        super().__init__()
        self._cleaned: set[Path] = set()

    @override
    def load_checkpoint(self, path: str | Path, map_location: Any = None, weights_only: bool | None = None) -> Any:
        """Read one file; tensors come to the CPU.

        Args:
            path: local file; an address that fsspec knows (`s3://…`), other than of the web, is read by Lightning.
            map_location: not used: what takes the tensors moves them.
            weights_only: True or not given.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is damaged, unsafe, no checkpoint, or an address of the web; or code was asked for.
        """
        require_no_code(weights_only)
        if "://" in str(path) and not re.match("https?:", str(path)):
            try:
                content: Any = super().load_checkpoint(path, weights_only=True)
            except pickle.UnpicklingError as error:
                raise ValueError(f"{path} is damaged, or holds more than tensors and plain values") from error
        else:
            content, _ = load_tensors(path)
        _require_checkpoint(content, path)
        return content

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write one file.

        Raises:
            OSError: naming the file, when it cannot be written; what was there before is left.
        """
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        self._clean(target.parent.resolve())
        # not into the file: torch would hide why it could not be written
        content = io.BytesIO()
        torch.save(checkpoint, content)
        with atomic_file(target) as file:
            file.write(content.getbuffer())

    def _clean(self, folder: Path) -> None:
        """Remove, once per process, what killed ones left in a folder and in that of other versions of the run."""
        if folder in self._cleaned:
            return
        self._cleaned.add(folder)
        temporary = f".{'[0-9a-f]' * 8}.tmp"
        remove_leftovers(folder, temporary)
        if folder.parent.name.startswith("version_"):
            remove_leftovers(folder.parents[1], f"version_*/{folder.name}/{temporary}")


def require_no_code(weights_only: bool | None) -> None:
    """Refuse to read a checkpoint in the way that would run code from it.

    Raises:
        ValueError: `weights_only` is False.
    """
    if weights_only is False:
        raise ValueError("weights_only=False would run code from the checkpoint: leave it out")


def _require_checkpoint(content: Any, path: str | Path) -> None:
    if not isinstance(content, dict):
        raise ValueError(f"{path} is no training checkpoint: expected parts by name, got a {type(content).__name__}")
    if all(isinstance(value, Tensor) for value in content.values()):
        # what processes that were spawned hand their weights back in
        return
    for name in ("pytorch-lightning_version", "state_dict"):
        if name not in content:
            raise ValueError(f"{path} is no training checkpoint: it has no {name}; use its weights by --model.weights")
    for name, kind in PARTS.items():
        if not isinstance(content.get(name, kind()), kind):
            raise ValueError(
                f"{path} is no training checkpoint: {name}: expected {kind.__name__}, got {content[name]!r:.80}"
            )
    if not re.match(r"\d+\.\d+(\.|$)", content["pytorch-lightning_version"]):
        raise ValueError(
            f"{path} is no training checkpoint: unknown version {content['pytorch-lightning_version']!r:.80}"
        )
