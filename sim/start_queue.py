"""The starts of the episodes to come, kept on the device that will need them.

Dimension letters: N worlds, n episodes, R rows in store, nq / nv MuJoCo's positions and velocities, W numbers that
make a randomised world different.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import islice
from typing import NamedTuple, final

import torch
from torch import Tensor

from flowsteer.sim.tasks.mujoco_task import MujocoTask


class Start(NamedTuple):
    """Of episodes, or of one: seed [...], qpos [..., nq], qvel [..., nv] and the numbers [..., W] of the world."""

    seed: Tensor
    qpos: Tensor
    qvel: Tensor
    fields: Tensor


@final
class StartQueue:
    """Starts of `seeds` in order, for `num_worlds` worlds that take them without asking the host.

    Random numbers are drawn on the host, one generator per seed, in blocks and ahead of need: after `refill`, twice as
    many starts are in store as all worlds can take at once, so that they can be taken twice before the host learns how
    many are gone. Seeds are read that far ahead, too.

    Args:
        parked: what a world does for which no seed is left; tells the device.
        draw_fields: seeds [n] -> [n, W] on the CPU.
    """

    def __init__(
        self,
        task: MujocoTask,
        num_worlds: int,
        seeds: Iterable[int],
        parked: Start,
        draw_fields: Callable[[list[int]], Tensor],
    ) -> None:
        self._task, self._num_worlds, self._device = task, num_worlds, parked.seed.device
        self._coming, self._draw_fields = iter(seeds), draw_fields
        # The last row stands for all that come after the last seed.
        self._stored = Start(*(part.clone()[None] for part in parked))
        self.taken = torch.zeros((), dtype=torch.int64, device=self._device)
        self.refill()

    def take(self, worlds: Tensor) -> Start:
        """The next starts [N] for the worlds of the mask [N], in their order; rows of others hold nothing of meaning.

        The seed is `IDLE` where the seeds have run out.
        """
        rows = (self.taken + worlds.cumsum(0) - 1).clamp(0, len(self._stored.seed) - 1)
        self.taken = self.taken + worlds.sum()
        return Start(*(part[rows] for part in self._stored))

    def drop(self, taken: int) -> None:
        """Forget the first rows; `taken` is what the host has read of `self.taken`."""
        gone = min(taken, len(self._stored.seed) - 1)
        self._stored = Start(*(part[gone:] for part in self._stored))
        self.taken = self.taken - taken

    def refill(self) -> None:
        """Draw what is missing."""
        seeds = list(islice(self._coming, 2 * self._num_worlds - (len(self._stored.seed) - 1)))
        if not seeds:
            return
        qpos, qvel = self._task.initial(torch, self._upload(torch.from_numpy(self._task.draws(seeds))))
        new = Start(self._upload(torch.tensor(seeds)), qpos, qvel, self._upload(self._draw_fields(seeds)))
        self._stored = Start(*map(_insert, self._stored, new))

    def _upload(self, values: Tensor) -> Tensor:
        if self._device.type == "cpu":
            return values
        # From pinned memory the copy waits neither for what the device still has to do nor the host for it.
        return values.pin_memory().to(self._device, non_blocking=True)


def _insert(stored: Tensor, new: Tensor) -> Tensor:
    """`new` before the last row of `stored`."""
    return torch.cat([stored[:-1], new.to(stored.dtype), stored[-1:]])
