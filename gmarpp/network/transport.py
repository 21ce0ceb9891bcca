"""How blocks attend that do not attend over all tokens of one grid: in windows, on grids that grow coarser upward.

Tokens of a block are the cells of its grid, in rows. A window partition is a permutation of them, with places for
padding. Tokens of a coarser grid, or keys that are fewer than tokens, are each made of several
(`gmarpp.network.pooling`). A block may pool its queries, and its residual with them: it attends from fewer tokens than
to.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from gmarpp.network.pooling import Grid, Pooling


@dataclass(frozen=True)
class Step:
    """Over which tokens a block attends.

    Attributes:
        grid: of the tokens that enter the block, h w, after the prefix tokens.
        windows: the token at each place of each window, (W, n); N where the place is padding.
        prefix: number of prefix tokens.
        keys: what keys are made of, where they are fewer than tokens; then there is one window.
        pool: how the block pools its queries, if it does.
        cells: the token of each cell of the grid, (N,), if tokens are not the cells in rows.
        merged: what the grid's tokens are made of, those of the next finer grid; of cells without overlap unless it is
            given.
        enters_in_windows: whether the block is given its tokens in windows, one after the other.
        has_residual: whether the block adds what it attends to to its tokens.
    """

    grid: Grid
    windows: Tensor
    prefix: int = 0
    keys: Pooling | None = None
    pool: "QueryPool | None" = None
    cells: Tensor | None = None
    merged: Pooling | None = None
    enters_in_windows: bool = False
    has_residual: bool = True

    @property
    def above(self) -> "Step":
        """The tokens that leave the block, and where in the windows its queries are."""
        return self if self.pool is None else self.pool.queries

    @property
    def tokens(self) -> int:
        """Number N of tokens."""
        return self.prefix + self.grid[0] * self.grid[1]

    @property
    def key_places(self) -> int:
        """How many keys there are in each window."""
        return self.windows.shape[1] if self.keys is None else self.keys.tokens

    @property
    def is_padded(self) -> bool:
        """Whether some places of windows are padding."""
        return self.windows.numel() > self.tokens

    @cached_property
    def is_token(self) -> Tensor:
        """Which places of the windows are tokens, (W, n)."""
        return self.windows < self.tokens

    def to(self, device: torch.device) -> "Step":
        """Return the step with its windows on a device."""
        pool = None if self.pool is None else self.pool.to(device)
        cells = None if self.cells is None else self.cells.to(device)
        keys, merged = (None if each is None else each.to(device) for each in (self.keys, self.merged))
        return replace(self, windows=self.windows.to(device), keys=keys, pool=pool, cells=cells, merged=merged)

    def into_windows(self, rows: Tensor) -> Tensor:
        """Lay rows (B, ..., N) out in windows, (B * W, ..., n); padding gets 0."""
        rows = F.pad(rows, (0, 1)) if self.is_padded else rows
        placed = torch.unflatten(rows.index_select(-1, self.windows.flatten()), -1, self.windows.shape)
        return placed.movedim(-2, 1).flatten(0, 1)

    def out_of_windows(self, placed: Tensor) -> Tensor:
        """Return rows (B, ..., N) of what lies in windows, (B * W, ..., n)."""
        by_window = torch.unflatten(placed, 0, (-1, len(self.windows))).movedim(1, -2)
        return by_window.flatten(-2).index_select(-1, self.places)

    def by_token(self, entered: Tensor) -> Tensor:
        """Return rows (B, N) of what belongs to the tokens that a block is given, which it may pool first."""
        if self.enters_in_windows:
            return self.out_of_windows(entered.reshape(-1, self.windows.shape[1]))
        if self.merged is not None and entered.shape[-1] != self.tokens:
            return self.merged.added(entered)
        return entered

    @cached_property
    def places(self) -> Tensor:
        """Where among the places of all windows the tokens are, (N,)."""
        # Padding has the largest number, so it comes last.
        return self.windows.flatten().argsort()[: self.tokens]

    def hand_down(self, rows: Tensor, shares: Tensor | None = None) -> Tensor:
        """Return rows (B, ..., N) of rows (B, ..., Q) of pooled tokens.

        Args:
            rows: to be shared out among the tokens that each pooled one is made of.
            shares: of these, (B, Q, k), see `QueryPool.of`; by default equal ones.
        """
        assert self.pool is not None
        made_of = self.pool.tokens
        if shares is None:
            is_token = (made_of < self.tokens).float()
            shares = (is_token / is_token.sum(dim=1, keepdim=True))[None]
        shares = shares.view(len(shares), *[1] * (rows.dim() - 2), *made_of.shape)
        found = rows.new_zeros(*rows.shape[:-1], self.tokens + 1)
        for place in range(made_of.shape[1]):
            # At one place, pooled tokens have different ones, so that the order of sums is always the same.
            found.index_add_(-1, made_of[:, place], rows * shares[..., place])
        return found[..., :-1]


@dataclass(frozen=True)
class QueryPool:
    """How a block pools its queries, Q for N tokens, and, by a maximum, its residual.

    Attributes:
        queries: the pooled tokens, and where in the windows they are; Q where the place is padding.
        tokens: of which tokens each pooled one is made, (Q, k); N where there are fewer than k.
        residual: what the maximum is taken of, (B, N, D') for tokens that enter the block, in their layout.
        has_mean: whether the mean follows the maximum, in as many channels again.
    """

    queries: Step
    tokens: Tensor
    residual: Callable[[Tensor], Tensor]
    has_mean: bool = False

    def to(self, device: torch.device) -> "QueryPool":
        """Return the pool with its tables on a device."""
        return replace(self, queries=self.queries.to(device), tokens=self.tokens.to(device))

    @torch.no_grad()
    def of(self, entered: Tensor) -> tuple[Tensor, Tensor]:
        """Return what the residual of a block's tokens is, and of which tokens it is made.

        Args:
            entered: tokens that enter the block, (B, N, D) or (B, h, w, D).

        Returns:
            the pooled residual, (B, Q, D'), and the shares that each of its tokens has in it, (B, Q, k): that of the
            channels in which the token is the maximum. They sum to 1.
        """
        values = self.residual(entered).flatten(1, -2)
        missing = self.tokens == values.shape[1]
        candidates = F.pad(values, (0, 0, 0, 1), value=float("-inf"))[:, self.tokens]  # (B, Q, k, D')
        pooled = candidates.amax(dim=2)
        wins = (candidates == pooled[:, :, None]).float()
        # Tokens that are alike share a channel, as they do its gradient.
        shares = (wins / wins.sum(dim=2, keepdim=True)).mean(dim=-1)
        if self.has_mean:
            counts = (~missing).sum(dim=1)[:, None]
            mean = candidates.masked_fill(missing[..., None], 0).sum(dim=2) / counts
            pooled = torch.cat([pooled, mean], dim=-1)
            shares = (shares + (~missing) / counts) / 2
        return pooled, shares


def cells(grid: Grid) -> Tensor:
    """Return the numbers of a grid's tokens, in the layout (1, h, w, 1) that networks shift and partition."""
    return torch.arange(grid[0] * grid[1]).view(1, *grid, 1)


def footprints(grid: Grid, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int] = (0, 0)) -> Tensor:
    """Return the tokens of a grid under a kernel at each of its places, (places, k); N outside the grid."""
    count = grid[0] * grid[1]
    numbers = torch.arange(1.0, count + 1, dtype=torch.float64).view(1, 1, *grid)
    found = F.unfold(numbers, tuple(kernel), stride=tuple(stride), padding=tuple(padding))[0].T.long() - 1
    return found.masked_fill(found < 0, count)


def padded(tokens: Tensor, window: Sequence[int], value: int = 0) -> Tensor:
    """Pad tokens (B, h, w, D) at the bottom and on the right to whole windows."""
    below, beside = (-side % length for side, length in zip(tokens.shape[1:3], window, strict=True))
    return F.pad(tokens, (0, 0, 0, beside, 0, below), value=value)


def shifted(tokens: Tensor, shift: Sequence[int]) -> Tensor:
    """Shift tokens (B, h, w, D) up and to the left, in a circle."""
    return tokens.roll((-shift[0], -shift[1]), (1, 2)) if any(shift) else tokens


def partitioned(tokens: Tensor, window: Sequence[int]) -> Tensor:
    """Cut tokens (B, h, w, D) into windows, (B * W, n, D).

    Raises:
        ValueError: if the windows do not divide the grid.
    """
    batch, height, width, channels = tokens.shape
    if height % window[0] or width % window[1]:
        raise ValueError(
            f"expected a grid that windows of {window[0]} x {window[1]} divide, got {height} x {width}: give images of "
            "another size"
        )
    parts = tokens.view(batch, height // window[0], window[0], width // window[1], window[1], channels)
    return parts.transpose(2, 3).reshape(-1, window[0] * window[1], channels)


def put_together(windows: Tensor, window: Sequence[int], grid: Sequence[int]) -> Tensor:
    """Put windows (B * W, n, D) together, (B, h, w, D)."""
    rows, columns = (side // length for side, length in zip(grid, window, strict=True))
    parts = windows.view(-1, rows, columns, *window, windows.shape[-1])
    return parts.transpose(2, 3).reshape(-1, *grid, windows.shape[-1])
