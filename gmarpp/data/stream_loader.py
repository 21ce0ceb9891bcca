"""The training loader of a stream, which Lightning saves and restores in the middle of an epoch."""

from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.data import DataLoader

from gmarpp.data.hub_rows import HubStream


class StreamLoader(DataLoader[Any]):
    """Batches of a `HubStream`, from the place on at which a run was saved.

    The order of a stream depends on its seed, its shuffle buffer and the processes that share it. The state is how many
    rows each of them has left behind; a resumed run reads these again, without decoding their images. It is exact for
    one rank. On several, whose shares may differ, an epoch starts again, and a warning says so.

    Args:
        stream: of training.
        *args: of torch's DataLoader.
        current_epoch: tells the epoch, when the first one is iterated and after a resume.
        progress: Lightning's progress through batches. An interrupted batch is not processed and will be repeated;
            without `progress`, every batch handed out counts.
        **kwargs: of torch's DataLoader, whose processes must persist, because they count the epochs.
    """

    def __init__(
        self, stream: HubStream, *args: Any, current_epoch: Callable[[], int], progress: Any = None, **kwargs: Any
    ) -> None:
        super().__init__(stream, *args, **kwargs)
        self.stream = stream
        self.current_epoch = current_epoch
        self.progress = progress
        self._epoch: int | None = None
        self._rows: list[int] = []
        self._turn = 0
        self._handed_out: deque[tuple[int, int]] = deque()
        self._counted = 0
        self._resumed: dict[str, Any] = {}

    @property
    def _order(self) -> dict[str, int]:
        """What decides the order of rows, by its option."""
        return {
            "trainer.devices": self.stream.world_size,
            "data.num_workers": self.num_workers,
            "data.shuffle_buffer": self.stream.shuffle_buffer,
            "data.seed": self.stream.seed,
        }

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """Yield the batches of an epoch that were not yet seen in it."""
        self._rows, self._turn = [0] * self._processes, 0
        if self._epoch is None:
            self._epoch = self.stream.epoch = self._next_epoch()
            self._restore_place()
            self.stream.rows_behind = tuple(self._rows)
        else:
            self._epoch += 1
        self._handed_out.clear()
        self._counted = self._processed
        for batch in self._in_turn(super().__iter__(), self._turn):
            last = int(batch["index"][-1])
            self._handed_out.append((last % self._processes, last // self._processes + 1))
            self._count()
            yield batch

    @property
    def _processes(self) -> int:
        return max(1, self.num_workers)

    def _in_turn(self, batches: Iterator[Any], first: int) -> Iterator[Any]:
        """Yield batches, which come from process 0, 1, … round by round, as if process `first` began each round."""
        waiting: list[Any] = []
        before = self._processes
        for batch in batches:
            process = int(batch["index"][-1]) % self._processes
            if process <= before:
                yield from waiting
                waiting = []
            before = process
            if process < first:
                waiting.append(batch)
            else:
                yield batch
        yield from waiting

    def _next_epoch(self) -> int:
        """Return the epoch to iterate, which Lightning may not yet count when it fetches the first batch."""
        epoch, progress = self.current_epoch(), self.progress
        if progress is None or self._resumed.get("epoch") != epoch or not progress.is_last_batch:
            return epoch
        # Saved beside the last batch, an epoch is over; saved by the validation after it, it is ended once more.
        return epoch + int(progress.total.completed == progress.total.processed - 1)

    def _restore_place(self) -> None:
        """Take the place in this epoch from a state of it, if the order is the same."""
        state, self._resumed = self._resumed, {}
        if state.get("epoch") != self._epoch:
            return
        changed = [name for name, value in self._order.items() if state["order"][name] != value]
        if not changed and self.stream.world_size == 1:
            self._rows, self._turn = list(state["rows"]), state["turn"]
            return
        reason = (
            ", ".join(f"{name} was {state['order'][name]} and is {self._order[name]}" for name in changed)
            or f"{self.stream.world_size} ranks share it"
        )
        rank_zero_warn(
            f"epoch {self._epoch} of the streamed data starts again, and images that it has seen come again: {reason}; "
            "a stream is resumed within an epoch by one rank with the options it was saved with"
        )

    @property
    def _processed(self) -> int:
        # The total, because Lightning sets the current number back only after it has fetched the first batch.
        return 0 if self.progress is None else int(self.progress.total.processed)

    def _count(self) -> None:
        """Take over the places of batches that were trained on."""
        waiting = 0
        if self.progress is not None:
            handed_out = self._processed - self._counted
            self._counted += handed_out
            waiting = max(0, len(self._handed_out) - handed_out)
        while len(self._handed_out) > waiting:
            process, rows = self._handed_out.popleft()
            self._rows[process] = rows
            self._turn = (process + 1) % self._processes

    def state_dict(self) -> dict[str, Any]:
        """Return the epoch, how many rows of it each process has left behind, whose turn it is, and the order."""
        self._count()
        place = {"epoch": self._epoch, "rows": list(self._rows), "turn": self._turn, "order": self._order}
        return self._resumed or place

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state when the stream is iterated next."""
        self._resumed = dict(state)
        self._epoch = None
        # Processes that were started before know nothing of it.
        self._iterator = None
