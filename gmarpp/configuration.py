"""Configuration files: read with limits, with errors that name the file and the line."""

import stat
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import get_loader, set_loader

# A file that exceeds these is damaged or malicious: the largest shipped one has 100 values.
_LARGEST_FILE = 2**20
_MOST_VALUES = 100_000
_DEEPEST_NESTING = 50
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
SECTIONS = frozenset(("trainer", "model", "explain", "write", "checkpoint", "last_checkpoint"))
"""Of a configuration, those that hold options."""


def limit_yaml() -> None:
    """Make the command-line parser refuse YAML whose aliases or nesting would exhaust the machine, anywhere."""
    load = get_loader("yaml")
    if load is not _load_limited:
        _load_limited.load = load  # type: ignore[attr-defined]
        set_loader("yaml", _load_limited, (yaml.YAMLError,))


def _load_limited(text: str) -> Any:
    _require_small(text)
    return _load_limited.load(text)  # type: ignore[attr-defined]


def require_readable_configurations(arguments: Sequence[str], sections: Collection[str] = SECTIONS) -> None:
    """Check the files that `--config` names.

    Args:
        arguments: the command line.
        sections: those that hold options and may not be empty.

    Raises:
        ValueError: naming the file, and the line where there is one.
        OSError: a file cannot be read.
    """
    for path in _configurations(arguments):
        text = _read(path)
        try:
            root = _require_small(text)
            yaml.load(text, _LOADER)
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise ValueError(f"--config {path}{_explain(error)}") from error
        _require_sections(path, root, sections)


def _configurations(arguments: Sequence[str]) -> Iterator[str]:
    for position, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name in ("--config", "-c"):
            if equals:
                yield value
            elif position + 1 < len(arguments):
                yield arguments[position + 1]


def _read(path: str) -> str:
    try:
        status = Path(path).stat()
    except (OSError, ValueError) as error:
        raise ValueError(f"--config {path[:200]}: cannot be read: {getattr(error, 'strerror', error)}") from error
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"--config {path}: expected a file, got a folder, a pipe or a device")
    if status.st_size > _LARGEST_FILE:
        raise ValueError(f"--config {path}: expected at most {_LARGEST_FILE} bytes, got {status.st_size}")
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"--config {path}: expected YAML in UTF-8, got other bytes at {error.start}") from error


def _require_small(text: str) -> yaml.Node | None:
    """Return the tree of a YAML text in which no value is repeated too often, nested too deep or given twice."""
    depth = 0
    for event in yaml.parse(text, _LOADER):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > _DEEPEST_NESTING:
            raise _error(event.start_mark, f"values are nested more than {_DEEPEST_NESTING} deep")
    root = yaml.compose(text, _LOADER)
    if root is not None:
        _count(root, {})
    return root


def _count(node: yaml.Node, counts: dict[int, int]) -> int:
    """Return how many values a node stands for with all its aliases written out."""
    if id(node) in counts:
        if counts[id(node)] < 0:
            raise _error(node.start_mark, "the value contains itself")
        return counts[id(node)]
    counts[id(node)] = -1
    children: list[yaml.Node] = []
    if isinstance(node, yaml.SequenceNode):
        children = node.value
    elif isinstance(node, yaml.MappingNode):
        _require_unique(node)
        children = [value for _, value in node.value]
    count = 1 + sum(_count(child, counts) for child in children)
    if count > _MOST_VALUES:
        raise _error(node.start_mark, f"there are more than {_MOST_VALUES} values")
    counts[id(node)] = count
    return count


def _require_unique(mapping: yaml.MappingNode) -> None:
    seen = set()
    for key, _ in mapping.value:
        if isinstance(key, yaml.ScalarNode):
            if key.value in seen:
                raise _error(key.start_mark, f"{key.value!r} is given twice")
            seen.add(key.value)


def _require_sections(path: str, root: yaml.Node | None, sections: Collection[str]) -> None:
    if not isinstance(root, yaml.MappingNode):
        given = "nothing" if root is None else f"a {root.id}"
        raise ValueError(f"--config {path}: expected sections such as trainer, model and data, got {given}")
    for key, value in root.value:
        line = key.start_mark.line + 1
        if key.tag != "tag:yaml.org,2002:str":
            raise ValueError(f"--config {path}, line {line}: expected the name of an option, got {key.value!r}")
        empty = value.tag == "tag:yaml.org,2002:null"
        if (
            key.value in sections
            and not isinstance(value, yaml.MappingNode)
            and (empty or not value.tag.endswith("str"))
        ):
            raise ValueError(f"--config {path}, line {line}: expected options under {key.value}, got {_shown(value)}")


def _shown(node: yaml.Node) -> str:
    return f"a {node.id}" if not isinstance(node, yaml.ScalarNode) else node.value or "nothing"


def _error(mark: yaml.Mark, problem: str) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=mark)


def _explain(error: Exception) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        return f", line {mark.line + 1}, column {mark.column + 1}: {error.problem}"
    return f": {error}"
