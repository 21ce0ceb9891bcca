"""Names that installed packages announce by entry points, each for a module that registers the name when imported."""

from importlib.metadata import EntryPoint, entry_points


def announced(group: str) -> tuple[str, ...]:
    """Return the names that packages announce in a group of entry points, sorted; nothing of theirs is imported."""
    return tuple(sorted({entry.name for entry in entry_points(group=group)}))


def import_announced(group: str, name: str) -> EntryPoint | None:
    """Import what a package announces a name for, and return its entry point; `None` if no package does.

    Raises:
        ValueError: several packages announce the name for different modules.
        ImportError: what it names cannot be imported.
    """
    values = {entry.value: entry for entry in entry_points(group=group, name=name)}
    if len(values) > 1:
        raise ValueError(
            f"expected one package to announce {name!r} in {group}, got {' and '.join(sorted(values))}: "
            "uninstall the others"
        )
    for entry in values.values():
        entry.load()
        return entry
    return None
