"""The command line: a door that imports torch only when a command runs."""

import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from gmarpp.cli.pages import COMMANDS, overview, page
from gmarpp.postponed import postponed

if TYPE_CHECKING:
    from gmarpp.cli.explain import EvaluationCLI, ExplainCLI
    from gmarpp.cli.train import TrainCLI

__all__ = ["explain_main", "main", "train_main"]


def main(args: list[str] | None = None) -> None:
    """Run `gmarpp`; a user's mistake ends with one line on stderr and a status other than 0.

    Args:
        args: command line without the program's name; `sys.argv`'s when `None`.
    """
    arguments = sys.argv[1:] if args is None else args
    name = arguments[0] if arguments else ""
    if name in ("", "-h", "--help"):
        _leave_with(overview(), status=0 if name else 2)
    if name == "--version":
        import gmarpp

        _leave_with(f"gmarpp {gmarpp.__version__}")
    if name not in COMMANDS:
        # An option before the command is no misspelled command.
        known = () if name.startswith("-") else COMMANDS
        close = "".join(f", close to {command}" for command in get_close_matches(name, known, n=1))
        sys.stderr.write(f"error: unknown command '{name}'{close}: choose from {', '.join(COMMANDS)}\n")
        raise SystemExit(2)
    given = _without_help(arguments, args)
    # Lightning's parser warns where it is handed the command line that it would find by itself.
    with _interruptible():
        _RUN[name](given[1:], None if args is None else given)


def _without_help(arguments: list[str], args: list[str] | None) -> list[str]:
    """Leave with a command's page where help is asked for; have the command's parser print it where all of it is."""
    name, *rest = arguments
    if {"-h", "--help"} & set(rest) or ("--help_all" in rest and not COMMANDS[name].every_option):
        _leave_with(page(name))
    if "--help_all" not in rest:
        return arguments
    if args is None:
        sys.argv[1:] = [name, "--help"]
    return [name, "--help"]


@contextmanager
def _interruptible() -> Iterator[None]:
    """End with one line where the user interrupts imports, before the command itself answers signals."""
    try:
        yield
    except KeyboardInterrupt:
        sys.stderr.write("stopped by SIGINT\n")
        raise SystemExit(130) from None


def train_main(args: list[str] | None = None) -> "TrainCLI":
    """Run `fit`, `validate` or `test`; a user's mistake ends with one line on stderr and a status other than 0.

    Args:
        args: command line without the program's name; `sys.argv`'s when `None`.
    """
    return _train(_asked(args, ("fit", "validate", "test")))


def explain_main(args: list[str] | None = None) -> "ExplainCLI | EvaluationCLI | None":
    """Run `predict`, or `validate`, `test` or `sanity` of any network; a user's mistake ends as one of `main`.

    Args:
        args: command line without the program's name; `sys.argv`'s when `None`.
    """
    return _explain(_asked(args, ("predict", "validate", "test", "sanity")))


def _asked(args: list[str] | None, commands: Sequence[str]) -> list[str] | None:
    arguments = sys.argv[1:] if args is None else args
    given = _without_help(arguments, args) if arguments[:1] and arguments[0] in commands else arguments
    return None if args is None else given


def _train(args: list[str] | None) -> "TrainCLI":
    with _interruptible():
        _import_torchmetrics()
        from gmarpp.cli import train

        return train.train_main(args)


def _explain(args: list[str] | None) -> "ExplainCLI | EvaluationCLI | None":
    arguments = sys.argv[1:] if args is None else args
    with _interruptible():
        if arguments[:1] == ["sanity"]:
            _run_sanity(arguments[1:], args)
            return None
        _import_torchmetrics()
        from gmarpp.cli import explain

        _log_to_stderr()
        evaluates = arguments[:1] in (["validate"], ["test"])
        return explain.evaluate_main(args) if evaluates else explain.explain_main(args)


def _run_training(_: list[str], args: list[str] | None) -> None:
    _train(args)


def _run_evaluation(options: list[str], args: list[str] | None) -> None:
    """Evaluate what was trained here as it was configured, and what was not by its own description."""
    if any(option.partition("=")[0] == "--model" for option in options) or _is_hub_folder(options):
        _explain(args)
    else:
        _train(args)


def _is_hub_folder(options: list[str]) -> bool:
    """Return whether the checkpoint is a folder of the Hugging Face Hub, and no configuration describes a network."""
    words = [word for option in options for word in option.split("=", 1)]
    following = dict(pairwise(words))
    return "--config" not in words and (Path(following.get("--ckpt_path", "")) / "config.json").is_file()


def _run_explanation(_: list[str], args: list[str] | None) -> None:
    _explain(args)


def _run_sanity(options: list[str], _: list[str] | None) -> None:
    _import_torchmetrics()
    from gmarpp.command import run_function
    from gmarpp.sanity import write_sanity_check

    _log_to_stderr()
    run_function(write_sanity_check, options, "gmarpp sanity")


def _run_export(options: list[str], _: list[str] | None) -> None:
    _import_torchmetrics()
    from gmarpp.command import run_function
    from gmarpp.export import export

    _log_to_stderr()
    run_function(export, options, "gmarpp export")


def _run_push(options: list[str], _: list[str] | None) -> None:
    from gmarpp.push import main as push_main

    _log_to_stderr()
    push_main(options)


def _run_overlays(options: list[str], _: list[str] | None) -> None:
    _import_torchmetrics()
    from gmarpp.command import run_function
    from gmarpp.run.overlays import write_overlays

    _log_to_stderr()
    run_function(write_overlays, options, "gmarpp overlays")


def _run_configs(options: list[str], _: list[str] | None) -> None:
    from gmarpp.cli.configs import configs_main

    try:
        configs_main(options)
    except (ValueError, OSError) as error:
        # As gmarpp.command has it, which imports torch.
        sys.stderr.write(f"error: {error}\n")
        raise SystemExit(2 if isinstance(error, ValueError) else 1) from None


_RUN: dict[str, Callable[[list[str], list[str] | None], None]] = {
    "fit": _run_training,
    "validate": _run_evaluation,
    "test": _run_evaluation,
    "predict": _run_explanation,
    "overlays": _run_overlays,
    "sanity": _run_sanity,
    "export": _run_export,
    "push": _run_push,
    "configs": _run_configs,
}


def _import_torchmetrics() -> None:
    """Import what Lightning imports anyway, without the packages that only its metrics of text and sound use."""
    with postponed("scipy.signal", "transformers"):
        import torchmetrics  # noqa: F401


def _log_to_stderr() -> None:
    logging.basicConfig(format="%(message)s")
    logging.getLogger("gmarpp").setLevel(logging.INFO)


def _leave_with(text: str, status: int = 0) -> NoReturn:
    sys.stdout.write(f"{text}\n")
    raise SystemExit(status)
