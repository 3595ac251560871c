"""Fields of a MuJoCo Warp model that each world has to itself: domain randomisation.

Dimension letters: N worlds, n episodes, W numbers that make a world different. Importing this needs Warp.
"""

from __future__ import annotations

from collections.abc import Iterable
from copy import copy
from dataclasses import fields
from typing import Any, final

import mujoco
import mujoco_warp
import numpy as np
import torch
import warp as wp
from numpy.typing import NDArray
from torch import Tensor

from flowsteer.sim.errors import SimError
from flowsteer.sim.tasks.mujoco_task import MujocoTask
from flowsteer.sim.tasks.randomization import Randomization


@final
class WorldFields:
    """Gives each world of a Warp model its own values of what `task.randomize` changes.

    The values of an episode are computed on the host by `Randomization`, as in the other back ends: the fields that it
    names and all that MuJoCo derives from them. `write` puts them into arrays [N, ...] that stand in the model in
    place of [1, ...], without waiting for the device.

    Args:
        host: the model that `model` and `data` were made of; spoiled by this.
        model, data: mujoco_warp.Model and mujoco_warp.Data of `num_worlds` worlds.

    Attributes:
        nominal: [W] of the model as it is without randomisation, on the CPU.

    Raises:
        SimError: a field cannot be scaled, or Warp cannot have it for each world.
    """

    def __init__(self, task: MujocoTask, host: Any, model: Any, data: Any, num_worlds: int) -> None:
        self._host, self._scratch = host, mujoco.MjData(host)
        self._randomization = Randomization(host, task.randomize)
        self._sources: list[tuple[Any, str]] = []
        self._views: list[Tensor] = []
        if task.randomize:
            for name in self._changing(task):
                self._own(host, model, name, num_worlds)
            self._own(host.stat, model.stat, "meaninertia", num_worlds)
            # Warp computes the poses of geoms that never move only once, when `data` is made.
            for name in ("geom_xpos", "geom_xmat"):
                self._add(self._scratch, name, getattr(data, name))
        mujoco.mj_kinematics(host, self._scratch)
        self.nominal = torch.from_numpy(self._numbers())
        self._widths = [view[0].numel() for view in self._views]

    def draw(self, seeds: Iterable[int]) -> Tensor:
        """The numbers [n, W] of the episodes `seeds`, on the CPU."""
        return torch.from_numpy(np.stack([self._randomized(seed) for seed in seeds]))

    def write(self, worlds: Tensor, numbers: Tensor) -> None:
        """Give the worlds of the mask [N] the numbers [N, W]."""
        for view, part in zip(self._views, torch.split(numbers, self._widths, dim=1), strict=True):
            mask = worlds.view(-1, *(1,) * (view.ndim - 1))
            view.copy_(torch.where(mask, part.reshape(view.shape), view))

    def close(self) -> None:
        """Let go of the device's memory."""
        self._views.clear()

    def _changing(self, task: MujocoTask) -> list[str]:
        """The fields of the Warp model that differ between episodes: those named, and what is derived from them."""
        probe = copy(self._host)
        self._randomization.apply(probe, self._scratch, seed=0)
        present = {field.name: getattr(field.type, "shape", ()) for field in fields(mujoco_warp.Model)}
        derived = {name for name in present if _differ(getattr(probe, name, None), getattr(self._host, name, None))}
        names = sorted({*task.randomize, *derived})
        for name in names:
            if present.get(name, ())[:1] != ("*",):
                raise SimError(
                    f"{task.spec.name}: MuJoCo Warp cannot have another {name} in each world, as task.randomize wants: "
                    "leave it out, or choose sim.backend=threads"
                )
        return names

    def _own(self, source: Any, target: Any, name: str, num_worlds: int) -> None:
        """Replace the array [1, ...] of this name in `target` by one [N, ...]."""
        shared = getattr(target, name)
        own = wp.array(np.repeat(shared.numpy(), num_worlds, axis=0), dtype=shared.dtype)
        setattr(target, name, own)
        self._add(source, name, own)

    def _add(self, source: Any, name: str, array: Any) -> None:
        self._sources.append((source, name))
        self._views.append(wp.to_torch(array))

    def _randomized(self, seed: int) -> NDArray[np.float32]:
        self._randomization.apply(self._host, self._scratch, seed)
        return self._numbers()

    def _numbers(self) -> NDArray[np.float32]:
        parts = [np.ravel(getattr(source, name)) for source, name in self._sources]
        return np.concatenate([np.zeros(0), *parts]).astype(np.float32)


def _differ(one: Any, other: Any) -> bool:
    return isinstance(one, np.ndarray) and one.dtype.kind == "f" and not np.array_equal(one, other)
