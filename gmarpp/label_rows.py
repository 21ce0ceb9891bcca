"""Which outputs of a network are explained of each image, where that is not one class: a row for each of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from gmarpp.attribution.target import class_indices
from gmarpp.network.modes import evaluation_mode
from gmarpp.network.output import logits_of
from gmarpp.network.task import task_of


@dataclass(frozen=True)
class LabelRows:
    """Rows, each an image of a batch and an output of the network.

    Attributes:
        task: one of `gmarpp.network.task.TASKS`.
        image: (R,) long, positions in the batch, ascending.
        target: (R,) long, outputs.
        place: (R,) long, of a row among those that its image can have.
        places: how many an image can have, in any batch.
    """

    task: str
    image: Tensor
    target: Tensor
    place: Tensor
    places: int

    @classmethod
    def of(cls, model: nn.Module, batch: Mapping[str, Any], target: str | int | Sequence[str | int]) -> Self | None:
        """Return the rows of a batch; None where every image has one class, which `gmarpp.explain` knows by itself.

        Of a multi-label network they are the labels that it predicts, with a probability of at least one half or else
        the most probable one; or those that an image has, which may be none. Of others they are all outputs. Classes
        that are asked for by name are explained of every image.

        Raises:
            ValueError: an image's labels are asked for, and unknown; or a class is.
        """
        task = task_of(model)
        by_itself = isinstance(target, str) and target in ("predicted", "label")
        if isinstance(target, str | int) and task == "multiclass":
            return None
        images: Tensor = batch["image"]
        if not by_itself:
            classes = [target] if isinstance(target, str | int) else target
            # A name and a number may mean one class.
            indices = list(dict.fromkeys(class_indices(each, model) for each in classes))
            asked = torch.tensor(indices, device=images.device)
            image, place = torch.ones(len(images), len(asked)).nonzero().T.to(images.device)
            return cls(task, image, asked[place], place, len(asked))
        with evaluation_mode(model), torch.no_grad():
            logits = logits_of(model(images))
        if task != "multilabel":
            chosen = torch.ones_like(logits, dtype=torch.bool)
        elif target == "predicted":
            # Of equal logits the first one, so that the rows are the same in every run.
            top = torch.nn.functional.one_hot(logits.argmax(1), logits.shape[1]).bool()
            chosen = (logits >= 0) | (top & (logits < 0).all(1, keepdim=True))
        else:
            chosen = _known(batch, logits.shape[1]) == 1
        image, output = chosen.nonzero().T
        return cls(task, image, output, output, logits.shape[1])

    def __len__(self) -> int:
        return len(self.image)

    def part(self, start: int, size: int) -> Self:
        """Return `size` of the rows."""
        rows = slice(start, start + size)
        return type(self)(self.task, self.image[rows], self.target[rows], self.place[rows], self.places)

    def batch(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Return a batch with one image per row, the row's number as its index, and the box or mask of its label."""
        image = self.image.tolist()
        rows: dict[str, Any] = {
            name: value[self.image.to(value.device)] if isinstance(value, Tensor) else [value[each] for each in image]
            for name, value in batch.items()
        }
        for name, dimensions in (("box", 2), ("mask", 3)):
            if rows.get(name) is not None and rows[name].dim() > dimensions:
                target = self.target.to(rows[name].device)
                rows[name] = rows[name][torch.arange(len(target), device=target.device), target]
        rows["index"] = rows["index"] * self.places + self.place.to(rows["index"].device)
        return rows

    def labels(self, labels: Tensor, predicted: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Return what each row says of its image: the true class and the predicted one, both (R,) long.

        Of labels that do not exclude each other, they are the row's own label or -1, where it is absent or unknown; of
        values, there is no true class.

        Args:
            labels: (R,) or (R, C), of the rows' images.
            predicted: (R,), the class with the largest logit.
            logits: (R, C).
        """
        target = self.target
        if self.task == "multiclass":
            return labels, predicted
        if self.task == "regression":
            return torch.full_like(target, -1), target
        column = labels[:, None] if labels.dim() == 1 else labels
        known = column.shape[1] == logits.shape[1]
        has = column.gather(1, target[:, None].to(labels.device))[:, 0] == 1 if known else torch.zeros_like(labels) == 1
        likely = logits.gather(1, target[:, None])[:, 0] >= 0
        return target.where(has.to(target.device), -1), target.where(likely, -1)


def _known(batch: Mapping[str, Any], outputs: int) -> Tensor:
    """Return an image's labels (B, C), of which at least one is known."""
    labels: Tensor = batch["label"]
    unknown = (labels < 0).flatten(1).all(1) if labels.dim() > 1 else torch.ones_like(labels, dtype=torch.bool)
    first = unknown.nonzero().flatten().tolist()
    if first:
        raise ValueError(
            f"explain.target is label, but {batch['path'][first[0]]} has none: explain the predicted labels, or name "
            "a label"
        )
    if labels.shape[1] != outputs:
        raise ValueError(f"labels: expected one for each of {outputs} outputs, got {labels.shape[1]}")
    return labels
