"""What a predict run says about itself in ``run.json``, and which of it two runs must share to be one."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from datetime import datetime, timezone
from functools import partial
from typing import Any

from gmarpp.network.task import task_of
from gmarpp.run.content import check_run
from gmarpp.run.versions import versions

_SAME: dict[str, tuple[str, ...]] = {
    "versions": ("gmarpp",),
    "checkpoint": ("sha256",),
    "model": ("name", "architecture", "parameters"),
    "data": ("name", "images", "paths_sha256"),
    "writer": ("overlays", "colormap", "opacity"),
    "trainer": ("precision",),
}
_FREE = {
    "explainer": {"batch_size"},
    "data.options": {
        *("batch_size", "num_workers", "pin_memory", "persistent_workers", "on_error", "balanced"),
        *("download", "extract_to", "cache_dir"),
    },
}


def now() -> str:
    """Return the time as an ISO 8601 string in UTC."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def _data_options(data: Any) -> dict[str, Any]:
    options = dict(getattr(data, "options", getattr(data, "hparams", {})))
    # Where nobody says, it is the device that chooses.
    return options if (size := getattr(data, "predict_batch_size", None)) is None else options | {"batch_size": size}


def describe_run(trainer: Any, module: Any, dataset: Any, writer: Mapping[str, Any]) -> dict[str, Any]:
    """Describe a predict run as JSON values.

    Args:
        trainer: Lightning's.
        module: with `model`, `explainer`, `classes` and `class_names`; `checkpoint_path` and `checkpoint_sha256` where
            they are known.
        dataset: of the predict loop.
        writer: the writer's options that decide what pictures look like.

    Raises:
        ValueError: naming an entry that nobody could read, such as a class that is no text.
    """
    data = trainer.datamodule
    paths = getattr(getattr(dataset, "source", None), "paths", None)
    explainer = module.explainer.for_network(module.model)
    options = [field.name for field in dataclasses.fields(explainer) if field.init]
    own_code = explainer.own_code
    configuration = getattr(module.model, "pretrained_cfg", None) or {}
    run = {
        "status": "running",
        "created": now(),
        "versions": versions(),
        "checkpoint": {name: getattr(module, f"checkpoint_{name}", None) for name in ("path", "sha256")},
        "model": {
            "name": type(module.model).__name__,
            "architecture": configuration.get("architecture"),
            "task": task_of(module.model),
            "parameters": sum(parameter.numel() for parameter in module.model.parameters()),
        },
        "explainer": {
            **{name: getattr(explainer, name) for name in options},
            "methods": list(explainer.names),
            **({"own_code": own_code} if own_code else {}),
        },
        "signed_methods": list(explainer.signed_methods),
        "data": {
            "name": None if data is None else type(data).__name__,
            "images": len(dataset),
            "paths_sha256": None if paths is None else hashlib.sha256(paths.tobytes()).hexdigest(),
            "options": _data_options(data),
        },
        "trainer": {"precision": trainer.precision},
        "writer": dict(writer),
        "classes": list(module.classes),
        "class_names": list(module.class_names),
        "processes": trainer.world_size,
    }
    described: dict[str, Any] = json.loads(json.dumps(run, default=_plain))
    check_run(described)
    return described


def require_same_run(previous: Mapping[str, Any], run: Mapping[str, Any], folder: Any) -> None:
    """Make sure that a run continues another one; how images are loaded, and how many at once, may differ.

    Raises:
        ValueError: naming the options that differ.
    """
    before, after = _compared(previous), _compared(run)
    differences = [
        f"{name} was {before.get(name)!r} and is {after.get(name)!r}"
        for name in sorted({*before, *after})
        if before.get(name) != after.get(name)
    ]
    if previous["classes"] != run["classes"]:
        differences.append("the classes differ")
    if differences:
        raise ValueError(
            f"cannot resume the run in {folder}: {'; '.join(differences)}. "
            "Give the same options, or choose another output folder"
        )


def _compared(run: Mapping[str, Any]) -> dict[str, Any]:
    """Return all of a run's description that another run must share, by dotted name."""
    found = {f"{section}.{name}": run.get(section, {}).get(name) for section, names in _SAME.items() for name in names}
    for section, options in (("explainer", run["explainer"]), ("data.options", run["data"].get("options", {}))):
        found |= {f"{section}.{name}": value for name, value in options.items() if name not in _FREE[section]}
    if run.get("signed_methods"):
        found["writer.signed_maps"] = run.get("writer", {}).get("signed_maps")
    return found


def _plain(value: Any) -> Any:
    # One that has a text of its own, as a contrast of targets, is described by it.
    if dataclasses.is_dataclass(value) and not isinstance(value, type) and type(value).__str__ is object.__str__:
        return dataclasses.asdict(value)
    if isinstance(value, partial):
        return {"function": value.func, "arguments": value.args, "keywords": value.keywords}
    kind: Any = type(value)
    if callable(value) or kind.__repr__ is object.__repr__:
        # Not by its address, which differs from run to run.
        named = value if hasattr(value, "__qualname__") else kind
        return f"{named.__module__}.{named.__qualname__}"
    return str(value)
