"""What the command lines of training and explaining share."""

import sys
from typing import Any, ClassVar

from lightning.pytorch.cli import LightningArgumentParser

from gmarpp.configuration import SECTIONS, limit_yaml, require_readable_configurations
from gmarpp.options import Range, require_ranges
from gmarpp.training.lightning_private import ParsedCommandLine


class CommandLine(ParsedCommandLine):
    """A LightningCLI that checks the files that its command line names before it builds anything.

    Attributes:
        sections: of a configuration, those that hold options and cannot be empty.
    """

    sections: ClassVar[frozenset[str]] = SECTIONS

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse the command line.

        Raises:
            ValueError: naming the file or the option that is wrong.
        """
        limit_yaml()
        require_readable_configurations(sys.argv[1:] if args is None else args, self.sections)
        super().parse_arguments(parser, args)
        options = self.config[self.config.subcommand]
        if not isinstance(options.seed_everything, bool):
            require_ranges(options, {"seed_everything": Range(0, 2**32 - 1)}, "--")


def parser_options(*subcommands: str) -> dict[str, Any]:
    """Return options by which every parser raises its errors instead of printing a page of usage."""
    return {"exit_on_error": False, **{name: {"exit_on_error": False} for name in subcommands}}
