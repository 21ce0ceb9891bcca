import ast
import importlib
import inspect
import re
import textwrap
from pathlib import Path

import lightning as L
import pytest
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loops.fit_loop import _FitLoop
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.plugins.io.wrapper import _WrappingCheckpointIO
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from lightning.pytorch.trainer.connectors.signal_connector import _SignalConnector

import gmarpp
from gmarpp.training import lightning_private

PACKAGE = Path(gmarpp.__file__).parent
HOME = Path(lightning_private.__file__)
# Which of Lightning's classes has which of the names that are used.
NAMES = {
    (_SubprocessScriptLauncher, "_call_children_scripts"),
    (DDPStrategy, "_launcher"),
    (_WrappingCheckpointIO, "_checkpoint_io"),
    (L.Trainer, "_signal_connector"),
    (_TrainingEpochLoop, "_broadcast_sigterm_tensor"),
    (_TrainingEpochLoop, "_batches_that_stepped"),
    (_SignalConnector, "_register_signal"),
    (_FitLoop, "_load_combined_loader_states"),
    (_FitLoop, "_combined_loader_states_to_load"),
    (_FitLoop, "_data_fetcher"),
    (ModelCheckpoint, "_save_checkpoint"),
    (ModelCheckpoint, "_remove_checkpoint"),
    (ModelCheckpoint, "_should_skip_saving_checkpoint"),
    (ModelCheckpoint, "_should_save_on_exception"),
    (ModelCheckpoint, "_last_global_step_saved"),
    (ModelCheckpoint, "_monitor_candidates"),
    (EMAWeightAveraging, "_swap_models"),
    (Callback, "_generate_state_key"),
    (L.LightningModule, "_trainer"),
    (L.LightningModule, "_on_before_batch_transfer"),
    (LightningCLI, "_get"),
    (LightningCLI, "_parser"),
    (LightningCLI, "_datamodule_class"),
    (LightningCLI, "_parse_ckpt_path"),
}


def private_names(cls):
    """Names that a class of Lightning, or one that it derives from, keeps to itself."""
    found = set()
    for base in cls.__mro__:
        if base.__module__.split(".")[0] == "lightning":
            found |= {name for name in vars(base) if re.match("_[a-z]", name)}
            found |= set(re.findall(r"self\.(_[a-z]\w*)", inspect.getsource(base)))
    return found - {"_abc_impl"}


def attributes(tree):
    return {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) if re.match("_[a-z]", node.attr)}


@pytest.mark.parametrize(("cls", "name"), sorted(NAMES, key=str))
def test_lightning_has_the_name(cls, name):
    assert name in private_names(cls)


def test_the_list_of_names_is_complete():
    assert attributes(ast.parse(HOME.read_text())) == {name for _, name in NAMES}


def modules():
    for path in sorted(PACKAGE.rglob("*.py")):
        if path != HOME and re.search(r"^(from|import) lightning", path.read_text(), re.MULTILINE):
            yield pytest.param(path, id=path.relative_to(PACKAGE).as_posix())


@pytest.mark.parametrize("path", [*modules()])
def test_no_other_module_uses_a_private_name_of_lightning(path):
    tree = ast.parse(path.read_text())
    imported = [
        name.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "lightning"
        for name in node.names
    ]
    assert not [name for name in imported if name.startswith("_")]
    # Of objects that a module did not derive: a trainer's, a loop's, a strategy's.
    assert not attributes(tree) & {name for _, name in NAMES}
    # Of classes that it did: what it defines or uses of itself must be its own.
    module = importlib.import_module(".".join(["gmarpp", *path.relative_to(PACKAGE).with_suffix("").parts]))
    for name, cls in inspect.getmembers(module, inspect.isclass):
        if cls.__module__ == module.__name__:
            own = attributes(ast.parse(textwrap.dedent(inspect.getsource(cls)))) | set(vars(cls))
            assert not own & private_names(cls), name
