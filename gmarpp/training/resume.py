"""Which checkpoint `--ckpt_path last` and `--ckpt_path best` mean."""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from gmarpp.files import expand_path
from gmarpp.training.ranks import launched_by_rank_zero

# Rank 0's choice for the ranks that it starts: another run may write a newer checkpoint in between.
_CHOICE = "GMARPP_CKPT_PATH"


def find_checkpoint(keyword: str, options: Namespace) -> str:
    """Return the newest checkpoint of the kind below the log folder, over all versions.

    Args:
        keyword: `last` or `best`.
        options: of the subcommand: `trainer`, `checkpoint` and `last_checkpoint`.

    Raises:
        FileNotFoundError: there is none; naming the folders searched.
    """
    if launched_by_rank_zero() and _CHOICE in os.environ:
        return os.environ[_CHOICE]
    kept = options["last_checkpoint" if keyword == "last" else "checkpoint"]
    folders = [expand_path(kept.dirpath)] if kept.dirpath else log_folders(options.trainer)
    pattern = re.sub(r"\{.*?\}", "*", kept.filename or keyword)
    names = (f"{pattern}.ckpt", f"{pattern}-v[0-9]*.ckpt")
    found = [path for folder in folders for name in names for path in folder.rglob(name)]
    if not found:
        raise FileNotFoundError(
            f"--ckpt_path {keyword}: there is no {names[0]} below {' or '.join(map(str, folders))}; "
            "name a checkpoint, or leave --ckpt_path out to begin"
        )
    os.environ[_CHOICE] = str(max(found, key=lambda path: path.stat().st_mtime_ns))
    return os.environ[_CHOICE]


def log_folders(trainer: Any) -> Sequence[Path]:
    """Return the folders below which a trainer's options have checkpoints kept."""
    loggers = trainer.logger if isinstance(trainer.logger, list) else [trainer.logger]
    arguments = [getattr(logger, "init_args", None) for logger in loggers]
    folders = [each.get("save_dir") for each in arguments if each is not None]
    return [expand_path(folder) for folder in folders if folder] or [expand_path(trainer.default_root_dir or ".")]
