"""The classes that a network tells apart, and their comparison with those of data."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from typing_extensions import Self


@dataclass(frozen=True)
class ClassList:
    """Classes in the order of a network's outputs; empty where they are not known.

    Args:
        classes: their identifiers, such as the names of folders.
        class_names: their names for people, in the same order.
    """

    classes: tuple[str, ...] = ()
    class_names: tuple[str, ...] = ()

    @classmethod
    def of(cls, source: Any) -> Self:
        """Return the classes of a network or a data module, empty where it has none."""
        return cls(tuple(getattr(source, "classes", ())), tuple(getattr(source, "class_names", ())))

    @classmethod
    def of_checkpoint(cls, content: Mapping[str, Any]) -> Self:
        """Return the classes that a checkpoint was trained on, empty where it does not say."""
        return cls(tuple(content.get("classes", ())), tuple(content.get("class_names", ())))

    def __bool__(self) -> bool:
        return bool(self.classes)

    def __str__(self) -> str:
        return f"{len(self.classes)}: {', '.join(self.classes[:3])}{', …' if len(self.classes) > 3 else ''}"

    @property
    def label(self) -> Self:
        """The latter of two classes alone, which is the label of a network with one output; else all of them."""
        return type(self)(self.classes[1:], self.class_names[1:]) if len(self.classes) == 2 else self

    def give_to(self, network: Any) -> None:
        """Have a network carry the classes, so that whatever explains it can name them."""
        network.classes, network.class_names = self.classes, self.class_names

    def require_count(self, count: int) -> None:
        """Compare the number of classes, where they are known, with that of a network's outputs.

        Raises:
            ValueError: they differ.
        """
        if self and len(self.classes) != count:
            raise ValueError(
                f"the data has {len(self.classes)} classes and num_classes is {count}: "
                f"set --model.num_classes {len(self.classes)}"
            )

    def require_same(self, trained: "ClassList", owner: str, data: str) -> None:
        """Compare the data's classes with those of a network.

        Args:
            trained: the network's classes.
            owner: what has them, for the message.
            data: the data's name, for the message.

        Raises:
            ValueError: they differ, in kind, number or order.
        """
        if self.classes == trained.classes:
            return
        pairs = enumerate(zip(self.classes, trained.classes, strict=False))
        shorter = min(len(self.classes), len(trained.classes))
        index = next((position for position, (one, other) in pairs if one != other), shorter)
        raise ValueError(
            f"the classes of the data ({data}: {self}) are not those {owner} ({trained}); they first differ at index "
            f"{index}; use data with the same classes in the same order, or fine-tune for the new ones with "
            "--model.weights"
        )
