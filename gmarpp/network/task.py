"""What a network's outputs mean."""

from typing import Any, Literal, TypeAlias, get_args

from torch import nn

TaskName: TypeAlias = Literal["multiclass", "binary", "multilabel", "regression"]
TASKS: tuple[str, ...] = get_args(TaskName)
_PROBLEM_TYPES = {"multi_label_classification": "multilabel", "regression": "regression"}


def task_of(model: nn.Module | None) -> str:
    """Return one of `TASKS`: a network's attribute `task`, or what a Hugging Face `problem_type` says; else multiclass.

    Outputs are logits of classes that exclude each other (multiclass), of one label (binary), of labels that do not
    exclude each other (multilabel), or values (regression).
    """
    network: Any = model
    task = getattr(network, "task", None)
    if task in TASKS:
        return str(task)
    return _PROBLEM_TYPES.get(getattr(getattr(network, "config", None), "problem_type", None) or "", "multiclass")


def score_of(task: str) -> Literal["probability", "sigmoid", "logit"]:
    """Return the score in which a task's outputs are measured."""
    if task in ("binary", "multilabel"):
        return "sigmoid"
    return "logit" if task == "regression" else "probability"
