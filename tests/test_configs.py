import os
import shlex
import sys
from pathlib import Path

import pytest
import yaml

from gmarpp.cli.explain import explain_main
from gmarpp.cli.train import train_main
from gmarpp.training.hyperparameters import arguments
from gmarpp.training.module import ViTClassifier

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "configs"
RECIPES = ["digits.yaml", "vit_large_tiny_imagenet.yaml", "vit_small_tiny_imagenet.yaml"]
PARTS = sorted(str(path.relative_to(CONFIGS)) for path in CONFIGS.glob("*/*.yaml"))


@pytest.fixture(autouse=True)
def at_root(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["train.py"])


def parsed(main, arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main([*arguments, "--print_config"])
    assert stop.value.code == 0
    return yaml.safe_load(capsys.readouterr().out)


def test_every_file_is_covered():
    assert {str(path.relative_to(CONFIGS)) for path in CONFIGS.rglob("*.yaml")} == {*RECIPES, *PARTS, "explain.yaml"}
    assert len(PARTS) >= 8


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe_parses_and_its_model_options_are_in_range(recipe, capsys):
    config = parsed(train_main, ["fit", "--config", f"configs/{recipe}"], capsys)
    assert config["trainer"]["gradient_clip_val"] == 1.0
    assert config["data"]["class_path"] in ("gmarpp.data.TinyImageNet", "gmarpp.data.Digits")
    (monitor,) = config["trainer"]["callbacks"]
    assert monitor["class_path"] == "gmarpp.callbacks.AttributionMonitor"
    assert monitor["init_args"]["images"] > 0
    small = {"architecture": "test_vit", "weights": None, "image_size": 32}
    ViTClassifier(**arguments({**config["model"], **small}))


@pytest.mark.parametrize("part", PARTS)
def test_part_changes_a_recipe(part, capsys):
    recipe = ["fit", "--config", "configs/digits.yaml"]
    config = parsed(train_main, [*recipe, "--config", f"configs/{part}"], capsys)
    assert config["trainer"] != parsed(train_main, recipe, capsys)["trainer"]


def test_callback_parts_add_up(capsys):
    parts = [f"--config=configs/callbacks/{name}.yaml" for name in ("ema", "early_stopping")]
    config = parsed(train_main, ["fit", "--config", "configs/digits.yaml", *parts], capsys)
    names = [callback["class_path"].rpartition(".")[2] for callback in config["trainer"]["callbacks"]]
    assert names[-2:] == ["AveragedWeights", "EarlyStopping"]


def test_explain_parses(capsys):
    config = parsed(explain_main, ["predict", "--config", "configs/explain.yaml", "--data.root=photos"], capsys)
    assert config["data"]["class_path"] == "gmarpp.data.ImageFolder"
    assert config["explain"]["methods"][0] == "token_relevance"
    assert (ROOT / config["ckpt_path"]).is_file()


def test_slurm_script_gives_each_rank_its_cpus_and_each_job_its_folder(capsys, monkeypatch):
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "5")
    monkeypatch.setenv("logs", "logs/slurm_7")
    command = os.path.expandvars((CONFIGS / "slurm.sh").read_text().replace("\\\n", " ").partition("\nsrun ")[2])
    options, _, arguments = command.partition(" gmarpp ")
    assert shlex.split(options) == ["--cpus-per-task=5"]
    config = parsed(train_main, shlex.split(arguments), capsys)
    assert config["trainer"]["num_nodes"] == 2
    assert config["data"]["init_args"]["num_workers"] == 5
    assert config["trainer"]["default_root_dir"] == "logs/slurm_7"
    assert config["trainer"]["logger"]["class_path"].endswith("TensorBoardLogger")
    assert config["trainer"]["logger"]["init_args"]["save_dir"] == "logs/slurm_7"
