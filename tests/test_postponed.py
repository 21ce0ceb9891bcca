import sys
from importlib import import_module
from typing import Union

import pytest

from gmarpp.postponed import postponed

MODULE = """
from typing import Optional
LOADED = True
class Tool:
    kind = "real"
    def __init__(self, size): self.size = size
    @classmethod
    def made(cls): return cls(7)
def twice(number): return 2 * number
"""
USER = """
import rarely.used
from rarely.used import Tool, twice
def hinted(tool: "Tool | None" = None, other: Tool | None = None) -> Tool: ...
def make(): return Tool(3), Tool.made(), Tool.kind, twice(4), rarely.used.twice(5)
def is_tool(value): return isinstance(value, Tool)
"""


@pytest.fixture
def packages(tmp_path, monkeypatch):
    (tmp_path / "rarely").mkdir()
    (tmp_path / "rarely" / "__init__.py").touch()
    (tmp_path / "rarely" / "used.py").write_text(MODULE)
    (tmp_path / "user.py").write_text(USER)
    (tmp_path / "at_once.py").write_text(f"{USER}made = make()")
    monkeypatch.syspath_prepend(tmp_path)
    yield
    for name in ("rarely", "rarely.used", "user", "at_once"):
        sys.modules.pop(name, None)


def test_a_postponed_module_is_imported_when_it_is_used(packages):
    with postponed("rarely.used", "not_installed_anywhere"):
        user = import_module("user")
    assert "rarely.used" not in sys.modules
    assert Union[user.Tool, int]  # noqa: UP007 as older packages write it

    made = user.make()
    real = import_module("rarely.used")
    assert real.LOADED
    assert [type(tool) for tool in made[:2]] == [real.Tool, real.Tool]
    assert (made[0].size, made[1].size, *made[2:]) == (3, 7, "real", 8, 10)
    assert user.is_tool(real.Tool(1))
    assert not user.is_tool("tool")


def test_use_at_import_finds_the_real_module(packages):
    with postponed("rarely.used"):
        at_once = import_module("at_once")
    assert at_once.made[2:] == ("real", 8, 10)
    assert sys.modules["rarely.used"].LOADED


def test_what_is_imported_already_stays(packages):
    real = import_module("rarely.used")
    with postponed("rarely.used"):
        assert import_module("user").Tool is real.Tool
    assert sys.modules["rarely.used"] is real
