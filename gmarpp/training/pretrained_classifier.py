"""The Lightning module of a network that was trained elsewhere: it is evaluated and explained as it is."""

from torch import Tensor, nn

from gmarpp.network.output import class_names, logits_of
from gmarpp.network.preprocessing import Preprocessing, give_preprocessing, tells_preprocessing
from gmarpp.network.task import task_of
from gmarpp.training.classes import ClassList
from gmarpp.training.classifier import Classifier
from gmarpp.training.execution import require_whole_network
from gmarpp.training.task import known_task


class PretrainedClassifier(Classifier):
    """Evaluates and explains a network of any kind.

    Where the network does not tell how its images are prepared, the data module says so.

    Args:
        network: from images (B, C, H, W) to logits (B, classes), or to an object with the attribute `logits`.
        path: where its weights come from, for the records.
        sha256: digest of its weights, likewise.
    """

    def __init__(self, network: nn.Module, path: str | None = None, sha256: str | None = None) -> None:
        super().__init__(path, sha256)
        self.model = network.eval()
        self.task = known_task(task_of(network))

    @property
    def preprocessing(self) -> Preprocessing | None:
        """How images have to be prepared for the network; `None` where it does not say."""
        return Preprocessing.of(self.model) if tells_preprocessing(self.model) else None

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes for people, in the order of the outputs."""
        return class_names(self.model)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (B, classes) of normalized images (B, C, H, W)."""
        return logits_of(self.model(images))

    def setup(self, stage: str) -> None:
        """Have the network tell how the data module prepares images, and compare their classes.

        Raises:
            ValueError: the data has other classes than the network or none is known where something is measured, or
                the strategy shares the network out.
        """
        require_whole_network(self.trainer.strategy)
        data = getattr(self.trainer, "datamodule", None)
        prepared = getattr(data, "preprocessing", None)
        if isinstance(prepared, Preprocessing):
            give_preprocessing(self.model, prepared)
        known, found = ClassList.of(self.model), ClassList.of(data)
        if known and found:
            found.require_same(known, "of the network", type(data).__name__)
        elif found:
            found.give_to(self.model)
        if stage in ("validate", "test"):
            if not self.classes:
                raise ValueError(
                    f"neither {type(self.model).__name__} nor the data names any classes, so there is nothing to "
                    "measure: give labeled images, with --data ImageFolder by --data.labelled true"
                )
            self.configure_metrics(len(self.classes))
