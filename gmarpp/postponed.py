"""Modules that packages import for a few of their functions, postponed until one of these is called."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any


class _Name(type):
    """Class of what is imported by name from a stand-in: a class, so that type hints and `isinstance` take it."""

    def _real(cls) -> Any:
        if isinstance(sys.modules.get(cls.__module__), _StandIn):
            del sys.modules[cls.__module__]
        return getattr(import_module(cls.__module__), cls.__name__)

    def __getattr__(cls, name: str) -> Any:
        return getattr(cls._real(), name)

    def __call__(cls, *arguments: Any, **options: Any) -> Any:
        return cls._real()(*arguments, **options)

    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, cls._real())


class _StandIn(ModuleType):
    """A module all of whose names are there, and import the real module when they are used."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Name(name, (), {"__module__": self.__name__})


@contextmanager
def postponed(*names: str) -> Iterator[None]:
    """Have whatever is imported meanwhile get stand-ins for modules that it imports, but hardly ever uses.

    A name taken from a stand-in imports the real module when it is called, asked for an attribute or compared with. All
    later imports find the real module.

    Args:
        names: modules; left out are those that are imported already or not installed.
    """
    stand_ins = {}
    for name in names:
        if name not in sys.modules and (spec := find_spec(name)) is not None:
            stand_ins[name] = _StandIn(name)
            stand_ins[name].__spec__ = spec
    sys.modules.update(stand_ins)
    try:
        yield
    finally:
        for name, stand_in in stand_ins.items():
            if sys.modules.get(name) is stand_in:
                del sys.modules[name]
