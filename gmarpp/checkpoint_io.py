"""Writing of training checkpoints that leaves the last complete one, whatever happens."""

import io
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from typing_extensions import override

from gmarpp.storage import atomic_file


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint in its own folder and gives it its name when the disk has all of it.

    Lightning writes to the system's temporary folder and moves the file. Where that is another file system, moving is
    copying: a full disk or a killed process then ends the old checkpoint, too.
    """

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Writes one file.

        Raises:
            OSError: naming the file, when it cannot be written; what was there before is left.
        """
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        # not into the file: torch would hide why it could not be written
        content = io.BytesIO()
        torch.save(checkpoint, content)
        with atomic_file(target) as file:
            file.write(content.getbuffer())
