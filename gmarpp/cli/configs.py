"""The command `configs`: the shipped configurations, which a wheel holds inside of the package."""

import sys
import textwrap
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from gmarpp.files import expand_path, write_atomically

_INDENT = 32


def configurations() -> dict[str, Path]:
    """Return the shipped configuration files by their name, such as `trainer/cpu.yaml`.

    Raises:
        FileNotFoundError: the installation has lost them.
    """
    package = Path(str(files("gmarpp")))
    # An editable install reads them where the repository has them.
    folder = next((path for path in (package / "configs", package.parent / "configs") if path.is_dir()), None)
    if folder is None:
        raise FileNotFoundError(f"expected the configurations in {package / 'configs'}: install gmarpp again")
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    paths.sort(key=lambda path: len(path.relative_to(folder).parts))
    return {path.relative_to(folder).as_posix(): path for path in paths}


def configs_main(args: Sequence[str]) -> None:
    """List the shipped configurations, or copy them into the folder that the command line names.

    Raises:
        ValueError: the command line holds anything but one folder.
        OSError: the files cannot be read or written.
    """
    if len(args) > 1 or any(argument.startswith("-") for argument in args):
        raise ValueError(f"configs: expected one folder to copy to, got {' '.join(args)}")
    if args:
        _copy(expand_path(args[0]))
    else:
        _list()


def _list() -> None:
    for name, path in configurations().items():
        text = textwrap.wrap(_first_comment(path), 100 - _INDENT) or [""]
        sys.stdout.write(f"{name:<{_INDENT}}{text[0]}\n")
        sys.stdout.writelines(f"{'':<{_INDENT}}{line}\n" for line in text[1:])
    sys.stdout.write("\ngmarpp configs FOLDER copies them there.\n")


def _copy(folder: Path) -> None:
    """Copy what is not there yet: what is there may hold changes, and stays."""
    for name, source in configurations().items():
        path = folder / name
        if path.exists() or path.is_symlink():
            sys.stdout.write(f"{path} exists already and is kept\n")
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, source.read_bytes())
        sys.stdout.write(f"{path}\n")


def _first_comment(path: Path) -> str:
    lines = path.read_text(encoding="utf-8").splitlines()
    return next((line.lstrip("# ") for line in lines if line.startswith("# ")), "")
