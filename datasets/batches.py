"""Endless batches of windows that can be stopped and resumed exactly."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, final

import torch
from torch import Tensor

from flowsteer.datasets.errors import DataError
from flowsteer.datasets.windows import Batch, Windows

BACKGROUND_BATCHES = 2


@final
class Batches(Iterator[Batch]):
    """Shuffled batches of `windows`, without end.

    Each epoch is a permutation of all windows derived from (seed, epoch); the rest of an epoch that does not fill a
    batch is dropped, another rest each time. With fewer windows than `batch_size`, an epoch is one batch of as many
    permutations as it takes.

    Args:
        windows: what to batch.
        batch_size: of the global batch, B.
        seed: of the order.
        rank, world_size: this process takes its contiguous slice of the global batch, which is the same whatever
            `world_size`.
        pin_memory: page-lock the tensors, so that their copy to a GPU overlaps with work.
        prefetch: batches gathered ahead in a background thread; None takes two where arrays lie on disk or memory is
            page-locked, else none, because a gather from memory is faster than handing it from thread to thread.

    Raises:
        DataError: if `batch_size` is not a positive multiple of `world_size`.
    """

    def __init__(
        self,
        windows: Windows,
        batch_size: int,
        *,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        pin_memory: bool = False,
        prefetch: int | None = None,
    ) -> None:
        if batch_size < 1 or batch_size % world_size or not 0 <= rank < world_size:
            raise DataError(
                f"batch_size {batch_size} must be a multiple of world_size {world_size}, rank {rank} below it"
            )
        self._windows = windows
        self._seed, self._batch_size = seed, batch_size
        share = batch_size // world_size
        self._slice = slice(rank * share, (rank + 1) * share)
        self._pin_memory = pin_memory
        self._epoch, self._offset = 0, 0
        self._order_epoch, self._order = -1, torch.empty(0, dtype=torch.int64)
        self._ahead: deque[Future[Batch]] = deque()
        in_background = windows.on_disk or pin_memory
        self._prefetch = BACKGROUND_BATCHES * in_background if prefetch is None else prefetch
        self._worker = ThreadPoolExecutor(1, "batches") if self._prefetch else None

    @property
    def batches_per_epoch(self) -> int:
        """How many batches one pass over the windows gives."""
        return max(1, len(self._windows) // self._batch_size)

    def __next__(self) -> Batch:
        if self._worker is None:
            batch = self._load(self._indices(0))
        else:
            while len(self._ahead) <= self._prefetch:
                self._ahead.append(self._worker.submit(self._load, self._indices(len(self._ahead))))
            batch = self._ahead.popleft().result()
        self._epoch, self._offset = self._position(1)
        return batch

    def state_dict(self) -> dict[str, int]:
        """The position after the last batch that was handed out."""
        return {
            "epoch": self._epoch,
            "offset": self._offset,
            "seed": self._seed,
            "batch_size": self._batch_size,
            "windows": len(self._windows),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken.

        Raises:
            DataError: if it belongs to other windows, another seed or batch size; nothing changes then.
        """
        for name, mine in self.state_dict().items():
            if name not in ("epoch", "offset") and state.get(name) != mine:
                raise DataError(
                    f"cannot resume: '{name}' was {state.get(name)} and is {mine}: use the same data and options"
                )
        self._ahead.clear()
        self._epoch, self._offset = int(state["epoch"]), int(state["offset"])

    def close(self) -> None:
        """Stop the background thread; safe to call twice."""
        self._ahead.clear()
        if self._worker is not None:
            self._worker.shutdown(cancel_futures=True)
            self._worker = None

    def _position(self, ahead: int) -> tuple[int, int]:
        """Epoch and batch within it, `ahead` batches after the current one."""
        epochs, offset = divmod(self._offset + ahead, self.batches_per_epoch)
        return self._epoch + epochs, offset

    def _indices(self, ahead: int) -> Tensor:
        epoch, offset = self._position(ahead)
        if epoch != self._order_epoch:
            self._order_epoch, self._order = epoch, self._permutation(epoch)
        return self._order[offset * self._batch_size :][: self._batch_size][self._slice]

    def _permutation(self, epoch: int) -> Tensor:
        # One large odd factor keeps (seed, epoch) pairs apart, so that seed 1 is not seed 0 one epoch later.
        generator = torch.Generator().manual_seed((self._seed * 0x9E3779B97F4A7C15 + epoch) % 2**63)
        repeats = -(-self._batch_size // len(self._windows))
        orders = [torch.randperm(len(self._windows), generator=generator) for _ in range(repeats)]
        return torch.cat(orders) if repeats > 1 else orders[0]

    def _load(self, indices: Tensor) -> Batch:
        batch = self._windows.gather(indices)
        return _pinned(batch) if self._pin_memory else batch


def epoch_batches(windows: Windows, batch_size: int) -> Iterator[Batch]:
    """All windows once, in order; the last batch may be smaller."""
    for start in range(0, len(windows), batch_size):
        yield windows.gather(torch.arange(start, min(start + batch_size, len(windows))))


def _pinned(batch: Batch) -> Batch:
    pinned = {key: tensor.pin_memory() for key, tensor in batch["obs"].items()}
    return {"obs": pinned, "action": batch["action"].pin_memory()}
