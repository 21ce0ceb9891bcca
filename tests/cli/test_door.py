import re
import subprocess
import sys

import pytest

from gmarpp.attribution import METHODS, VARIANTS
from gmarpp.cli import main
from gmarpp.cli.pages import COMMANDS, page
from gmarpp.metrics import METRICS


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["gmarpp"])


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


@pytest.mark.parametrize("name", ["fit", "validate", "predict", "sanity", "export"])
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
        (["export", "--ckpt_path=none.ckpt", "--output=a.onnx", "--sufix=1"], "--sufix", 2),
    ],
)
def test_mistakes_end_with_one_line(arguments, message, status, capsys):
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
