"""Types and ranges of options: checked where the options are declared, with messages that name them."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from jsonargparse.typing import restricted_string_type

if TYPE_CHECKING:
    Name: TypeAlias = str
else:
    # Beside a plain `str`, the parser takes a class with wrong options for a name, and does not say what is wrong.
    Name = restricted_string_type("Name", r"[^\[{]", docstring="A text that is no list and no mapping.")


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, either of which may be left out; never NaN or infinite.

    >>> str(Range(0, 1, low_open=True)), 0.5 in Range(0, 1), math.inf in Range(0)
    ('a number in (0, 1]', True, False)
    """

    low: float = -math.inf
    high: float = math.inf
    low_open: bool = False
    high_open: bool = False

    def __contains__(self, value: Any) -> bool:
        if not isinstance(value, int | float) or not math.isfinite(value):
            return False
        above = value > self.low if self.low_open else value >= self.low
        return above and (value < self.high if self.high_open else value <= self.high)

    def __str__(self) -> str:
        if self.high < math.inf:
            return f"a number in {'[('[self.low_open]}{self.low:.12g}, {self.high:.12g}{'])'[self.high_open]}"
        return f"a number {'above' if self.low_open else 'of at least'} {self.low:.12g}"


def require_ranges(options: Mapping[str, Any], ranges: Mapping[str, Range], prefix: str = "") -> None:
    """Check options; one that is missing or None is in range, a list or tuple if all its items are.

    Args:
        options: values by name.
        ranges: by name.
        prefix: what stands before the name on the command line, as in `--model.`.

    Raises:
        ValueError: naming the first option that is out of range.
    """
    for name, allowed in ranges.items():
        value = options.get(name)
        values = value if isinstance(value, list | tuple) else [] if value is None else [value]
        if any(each not in allowed for each in values):
            raise ValueError(f"{prefix}{name}: expected {allowed}, got {value}")
