"""The command line: a door that imports torch only when a command runs."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gmarpp.cli.explain import ExplainCLI
    from gmarpp.cli.train import TrainCLI

__all__ = ["explain_main", "train_main"]


def train_main(args: list[str] | None = None) -> "TrainCLI":
    """Run `fit`, `validate` or `test`; a user's mistake ends with one line on stderr and a status other than 0.

    Args:
        args: command line without the program's name; `sys.argv`'s when `None`.
    """
    from gmarpp.cli import train

    return train.train_main(args)


def explain_main(args: list[str] | None = None) -> "ExplainCLI":
    """Run `predict`; a user's mistake ends with one line on stderr and a status other than 0.

    Args:
        args: command line without the program's name; `sys.argv`'s when `None`.
    """
    from gmarpp.cli import explain

    return explain.explain_main(args)
