"""Configuration files that are wrong in every way: one error that names the file, and the line where there is one."""

import os
import random
import time
from pathlib import Path

import pytest
from jsonargparse import ArgumentError, ArgumentParser

from gmarpp.configuration import limit_yaml, require_readable_configurations

RECIPE = (Path(__file__).parents[1] / "configs" / "vit_small_tiny_imagenet.yaml").read_bytes()
BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{level + 1}: &a{level + 1} [{', '.join([f'*a{level}'] * 9)}]\n" for level in range(9)
)
DAMAGED = {
    "": "expected sections such as trainer, model and data, got nothing",
    "- 1\n- 2": "got a sequence",
    "hello": "got a scalar",
    "trainer:\n\tmax_epochs: 3": "line 2, column 1: found character that cannot start any token",
    "trainer: {max_epochs: [1, 2": "line 2, column 1: did not find expected",
    "trainer: {max_epochs: 'x": "unexpected end of stream",
    "trainer:\n  max_epochs: 3\n max_steps: 4": "line 3, column 2",
    "trainer: {}\nmodel: {}\ntrainer: {max_epochs: 2}": "line 3, column 1: 'trainer' is given twice",
    "trainer: *gone": "line 1, column 10: found undefined alias",
    "trainer: {}\n---\ntrainer: {}": "another document",
    "trainer: !!python/object/apply:os.system [exit]": "could not determine a constructor",
    "trainer: &a\n  callbacks: [*a]": "the value contains itself",
    "&a\ntrainer: *a": "the value contains itself",
    BOMB: "there are more than 100000 values",
    BOMB + "model: {model_args: {x: *a9}}": "there are more than 100000 values",
    "trainer: " + "[" * 20000: "nesting",
    "model: " + "{a: " * 60 + "1" + "}" * 60: "nested more than 50 deep",
    "trainer: {max_epochs: " + "9" * 10000 + "}": "limit",
    "trainer: {max_epochs: \0}": "control characters",
    "1: 2": "line 1: expected the name of an option, got '1'",
    "model: {}\ntrainer: [1]": "line 2: expected options under trainer, got a sequence",
    "model: null": "expected options under model, got null",
    "trainer: {} # " + "x" * 2**20: "expected at most 1048576 bytes",
}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def refusal(path="c.yaml"):
    began = time.process_time()
    with pytest.raises(ValueError, match=rf"--config {path}") as error:
        require_readable_configurations(["fit", "--config", path])
    assert time.process_time() - began < 20
    return str(error.value)


@pytest.mark.parametrize("text", DAMAGED, ids=lambda text: text[:20].replace("\0", "NUL") or "empty")
def test_damaged_text_names_file_and_place(text):
    Path("c.yaml").write_text(text)
    assert DAMAGED[text] in refusal()


def test_what_is_no_text_file_is_refused_unread():
    Path("folder").mkdir()
    os.mkfifo("pipe")
    Path("latin.yaml").write_bytes("trainer: {} # \xe9".encode("latin-1"))
    assert "expected a file, got a folder, a pipe or a device" in refusal("folder")
    assert "expected a file, got a folder, a pipe or a device" in refusal("pipe")
    assert "No such file" in refusal("gone.yaml")
    assert "expected YAML in UTF-8" in refusal("latin.yaml")


def test_damaged_recipes_are_read_or_refused_by_name():
    generator = random.Random(0)
    refused = 0
    for _ in range(150):
        content = bytearray(RECIPE)
        for _ in range(generator.randint(1, 4)):
            place = generator.randrange(len(content))
            if generator.random() < 0.5:
                content[place] = generator.randrange(256)
            else:
                del content[place : place + generator.randint(1, 400)]
        Path("c.yaml").write_bytes(content)
        try:
            require_readable_configurations(["--config=c.yaml"])
        except ValueError as error:
            assert str(error).startswith("--config c.yaml")  # noqa: PT017 - most are still right
            refused += 1
    assert 10 < refused < 150


def test_shipped_recipe_passes():
    Path("c.yaml").write_bytes(RECIPE)
    require_readable_configurations(["fit", "-c", "c.yaml"])


def test_limits_hold_for_values_of_the_command_line():
    limit_yaml()
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--x", type=dict)
    assert parser.parse_args(["--x={a: {b: 1}}"]).x == {"a": {"b": 1}}
    began = time.process_time()
    with pytest.raises(ArgumentError, match="x"):
        parser.parse_args([f"--x={BOMB}"])
    assert time.process_time() - began < 20
