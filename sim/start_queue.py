"""The starts of the episodes to come, kept on the device that will need them.

Dimension letters: N worlds, R rows in store, nq / nv MuJoCo's positions and velocities.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from typing import final

import torch
from torch import Tensor

from flowsteer.sim.tasks.mujoco_task import MujocoTask
from flowsteer.sim.vec_env import IDLE


@final
class StartQueue:
    """Starts of `seeds` in order, for `num_worlds` worlds that take them without asking the host.

    Random numbers are drawn on the host, one generator per seed, in blocks and ahead of need: after `refill`, twice as
    many starts are in store as all worlds can take at once, so that they can be taken twice before the host learns how
    many are gone. Seeds are read that far ahead, too.

    Args:
        parked: qpos [nq] and qvel [nv] of a world for which no seed is left.
    """

    def __init__(
        self,
        task: MujocoTask,
        num_worlds: int,
        seeds: Iterable[int],
        parked: tuple[Tensor, Tensor],
        device: torch.device,
    ) -> None:
        self._task, self._num_worlds, self._device = task, num_worlds, device
        self._coming = iter(seeds)
        # The last row stands for all that come after the last seed.
        self._seed = torch.tensor([IDLE], device=device)
        self._qpos, self._qvel = (values.clone()[None] for values in parked)
        self.taken = torch.zeros((), dtype=torch.int64, device=device)
        self.refill()

    def take(self, worlds: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The next starts for the worlds of the mask [N], in their order: seeds [N], qpos [N, nq], qvel [N, nv].

        `IDLE` where the seeds have run out; rows of other worlds hold nothing of meaning.
        """
        rows = (self.taken + worlds.cumsum(0) - 1).clamp(0, len(self._seed) - 1)
        self.taken = self.taken + worlds.sum()
        return self._seed[rows], self._qpos[rows], self._qvel[rows]

    def drop(self, taken: int) -> None:
        """Forget the first rows; `taken` is what the host has read of `self.taken`."""
        gone = min(taken, len(self._seed) - 1)
        self._seed, self._qpos, self._qvel = self._seed[gone:], self._qpos[gone:], self._qvel[gone:]
        self.taken = self.taken - taken

    def refill(self) -> None:
        """Draw what is missing."""
        seeds = list(islice(self._coming, 2 * self._num_worlds - (len(self._seed) - 1)))
        if not seeds:
            return
        qpos, qvel = self._task.initial(torch, self._upload(torch.from_numpy(self._task.draws(seeds))))
        self._seed = _insert(self._seed, self._upload(torch.tensor(seeds)))
        self._qpos, self._qvel = _insert(self._qpos, qpos), _insert(self._qvel, qvel)

    def _upload(self, values: Tensor) -> Tensor:
        if self._device.type == "cpu":
            return values
        # From pinned memory the copy waits neither for what the device still has to do nor the host for it.
        return values.pin_memory().to(self._device, non_blocking=True)


def _insert(stored: Tensor, new: Tensor) -> Tensor:
    """`new` before the last row of `stored`."""
    return torch.cat([stored[:-1], new.to(stored.dtype), stored[-1:]])
