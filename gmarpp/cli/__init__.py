"""The command line."""

from gmarpp.cli.explain import explain_main
from gmarpp.cli.train import train_main

__all__ = ["explain_main", "train_main"]
