import re
import subprocess
import sys
from pathlib import Path

import pytest

from gmarpp.attribution import METHODS, VARIANTS
from gmarpp.cli import main
from gmarpp.cli.pages import COMMANDS, page
from gmarpp.metrics import METRICS

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["gmarpp"])
    return tmp_path


def printed(capsys, *arguments, status=0):
    with pytest.raises(SystemExit) as stop:
        main(list(arguments))
    assert stop.value.code == status
    return capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], *([name, "--help"] for name in COMMANDS)])
def test_help_fits_a_screen_and_needs_no_torch(arguments, capsys):
    text = printed(capsys, *arguments)
    assert len(text.splitlines()) <= 40
    assert max(map(len, text.splitlines())) <= 100

    code = f"import sys\nfrom gmarpp.cli import main\ntry:\n    main({arguments})\nexcept SystemExit:\n    pass\n"
    check = "assert not {'torch', 'lightning', 'jsonargparse'} & set(sys.modules)"
    run = subprocess.run([sys.executable, "-c", code + check], check=True, capture_output=True, text=True)
    assert run.stdout == text


def test_overview_names_every_command_method_and_metric(capsys):
    words = set(re.findall(r"\w+", printed(capsys, "--help")))
    assert words >= {*COMMANDS, *METHODS, *VARIANTS, *METRICS}


def test_without_a_command_the_overview_is_no_success(capsys):
    assert "commands:" in printed(capsys, status=2)


def test_configs_are_listed_with_what_they_are_for(capsys):
    main(["configs"])
    text = capsys.readouterr().out
    for path in CONFIGS.rglob("*.*"):
        comment = next(line for line in path.read_text().splitlines() if line.startswith("# "))
        (line,) = (line for line in text.splitlines() if line.startswith(f"{path.relative_to(CONFIGS).as_posix()} "))
        assert comment[2:40] in line
    assert max(map(len, text.splitlines())) <= 100


def test_configs_are_copied_once_and_never_overwritten(folder, capsys):
    (folder / "mine").mkdir()
    (folder / "mine" / "digits.yaml").write_text("changed: true\n")
    main(["configs", "mine"])
    kept = [line for line in capsys.readouterr().out.splitlines() if "kept" in line]
    assert kept == ["mine/digits.yaml exists already and is kept"]
    assert (folder / "mine" / "digits.yaml").read_text() == "changed: true\n"
    copied = {path.relative_to(folder / "mine") for path in (folder / "mine").rglob("*.*")}
    assert copied == {path.relative_to(CONFIGS) for path in CONFIGS.rglob("*.*")}
    for name in copied - {Path("digits.yaml")}:
        assert (folder / "mine" / name).read_bytes() == (CONFIGS / name).read_bytes()


@pytest.mark.parametrize("name", ["fit", "validate", "predict", "overlays", "sanity", "export", "push"])
def test_page_promises_options_that_there_are(name, capsys):
    options = {option.split()[0] for option in COMMANDS[name].options} - {"--data.NAME"}
    every = printed(capsys, name, "--help_all")
    assert options <= set(re.findall(r"--[\w.]+", every))
    assert options <= set(re.findall(r"--[\w.]+", page(name)))


@pytest.mark.parametrize(
    ("name", "close"),
    [("prdict", "close to predict: "), ("--config", "'--config': "), ("zzz", "'zzz': choose from fit, ")],
)
def test_unknown_command_ends_with_one_line(name, close, capsys):
    with pytest.raises(SystemExit) as stop:
        main([name])
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert close in line


@pytest.mark.parametrize(
    ("arguments", "message", "status"),
    [
        (["validate", "--data=Digits", "--model.pretrained=false"], "--ckpt_path is missing", 1),
        (["predict", "--data=Digits"], "--ckpt_path is missing", 1),
        (["sanity", "--ckpt_path=none.ckpt", "--data=Digits"], "none.ckpt", 1),
        (["export", "--ckpt_path=none.ckpt", "--output=a.txt"], "a.txt", 1),
        (["overlays", "--run=none"], "none holds no explanations", 1),
        (["overlays", "--run=none", "--colormap=pink"], "unknown colormap 'pink': choose from inferno", 1),
        (["configs", "one", "two"], "got one two", 2),
        (["configs", "--overwrite"], "got --overwrite", 2),
        (["configs", "file/below"], "file", 1),
        (["export", "--ckpt_path=none.ckpt", "--output=a.onnx", "--sufix=1"], "--sufix", 2),
    ],
)
def test_mistakes_end_with_one_line(arguments, message, status, folder, capsys):
    (folder / "file").touch()
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == status
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_the_console_reads_its_own_command_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gmarpp", "export", "--help_all"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 0
    assert "usage: gmarpp export" in capsys.readouterr().out


def test_commands_start_without_packages_that_they_do_not_need():
    code = """
import contextlib, io, sys
from gmarpp.cli import main
with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):
    main(["predict", "--help_all"])
from gmarpp.cli import train
slow = {"transformers", "scipy.signal", "scipy.stats", "datasets", "pandas", "pyarrow", "tensorboard", "sklearn"}
assert not slow & set(sys.modules), slow & set(sys.modules)

from torchmetrics.functional.text import bert
import transformers, scipy.signal
assert bert.AutoTokenizer.from_pretrained == transformers.AutoTokenizer.from_pretrained
assert scipy.signal.convolve([1, 2], [3, 4]).tolist() == [3, 10, 8]
"""
    subprocess.run([sys.executable, "-c", code], check=True)
