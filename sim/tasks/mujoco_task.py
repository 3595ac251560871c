"""A task in MuJoCo that is written once and runs in any back end: a model and pure functions of batched arrays.

Dimension letters: N worlds, T times, nq / nv / nu MuJoCo's positions, velocities, controls, Da action width.
`xp` is the array library of the back end: `numpy`, or `torch` on any device. The functions below use only what both
have under the same name (clip, abs, sum, all, cos, stack, concat, ...), with `axis=`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any, ClassVar, NamedTuple, final

import numpy as np
from numpy.typing import NDArray

from flowsteer.sim.complaints import stopped
from flowsteer.sim.errors import SimError, optional_module
from flowsteer.sim.tasks.base import Array, SingleEnv, Task

Xp = ModuleType
Batch = Any
"""An array of `xp`."""


class State(NamedTuple):
    """Worlds at one or several times: qpos [..., nq], qvel [..., nv], sensors [..., nsensordata].

    Sensors lag by one physics step, as MuJoCo evaluates them before it integrates; at a reset they are current.
    """

    qpos: Batch
    qvel: Batch
    sensors: Batch


class Judgement(NamedTuple):
    """Of control steps: rewards [...]; whether the episode ends there by the task's rule and whether the task is
    solved there, bool [...]."""

    reward: Batch
    terminated: Batch
    success: Batch


class MujocoTask(Task, ABC):
    """An MJCF model and what an episode in it means.

    Concrete tasks are final. A control step is `frame_skip` physics steps under the same control.

    Args:
        randomize: {field of the model: (low, high)}: factors by which its rows are scaled in each episode, see
            `Randomization`.
    """

    heavy: ClassVar[bool] = False
    frame_skip: ClassVar[int]
    camera: ClassVar[str | None] = None
    """The camera of the model to film with; None for MuJoCo's free camera."""

    def __init__(self, randomize: Mapping[str, Sequence[float]] | None = None) -> None:
        self.randomize = {name: tuple(values) for name, values in (randomize or {}).items()}

    @abstractmethod
    def load(self) -> Any:
        """The mujoco.MjModel as its file describes it.

        Raises:
            SimError: it does not load, or a package is missing.
        """

    @abstractmethod
    def draw(self, rng: np.random.Generator) -> NDArray[np.float64]:
        """All random numbers that the start of an episode needs, [D]."""

    @abstractmethod
    def initial(self, xp: Xp, draws: Batch) -> tuple[Batch, Batch]:
        """Starts (qpos [N, nq], qvel [N, nv]) made of draws [N, D]."""

    @abstractmethod
    def control(self, xp: Xp, actions: Batch) -> Batch:
        """Controls [..., nu] of actions [..., Da]."""

    @abstractmethod
    def observe(self, xp: Xp, state: State) -> dict[str, Batch]:
        """The arrays named and shaped as in the spec."""

    @abstractmethod
    def judge(self, xp: Xp, before: State, actions: Batch, after: State) -> Judgement:
        """What control steps from `before` to `after` under `actions` [..., Da] are worth."""

    def project(self, actions: Array) -> Array | None:
        """See `SingleEnv.project`."""
        return None

    @final
    def model(self) -> Any:
        """The model, such that qpos, qvel and the control determine what follows, and broken worlds can be told.

        Raises:
            SimError: it does not load, or its rate is not that of the spec.
        """
        try:
            model = self.load()
        except ValueError as error:
            raise stopped(self.spec.name, error) from error
        disable = optional_module("mujoco", "mujoco").mjtDisableBit
        # The solver's warm start is state that a reset or the next chunk would have to carry; the automatic reset
        # would hide a world that has blown up.
        model.opt.disableflags |= disable.mjDSBL_WARMSTART | disable.mjDSBL_AUTORESET
        hz = 1 / (model.opt.timestep * self.frame_skip)
        if abs(hz - self.spec.control_hz) > 1e-6 * hz:
            raise SimError(f"{self.spec.name}: {self.frame_skip} steps of the model are {hz:.6g} Hz, not the spec's")
        return model

    @final
    def draws(self, seeds: Any) -> NDArray[np.float64]:
        """The draws [N, D] of the episodes `seeds`, each from its seed alone."""
        return np.stack([self.draw(np.random.default_rng(seed)) for seed in seeds])

    @final
    def make(self) -> SingleEnv:
        """One world."""
        # Not at the top: that module knows tasks.
        from flowsteer.sim.tasks.mujoco_env import MujocoEnv

        return MujocoEnv(self)


def load_mjcf(path: str, assets: dict[str, bytes] | None = None) -> Any:
    """Compile the MJCF file at `path`.

    Raises:
        SimError: the compiler's complaint, on one line.
    """
    mujoco = optional_module("mujoco", "mujoco")
    try:
        return mujoco.MjModel.from_xml_path(path, assets)
    except ValueError as error:
        raise SimError(f"{path} is no MuJoCo model: {' '.join(str(error).split())}") from None
