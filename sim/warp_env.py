"""MuJoCo worlds in MuJoCo Warp: thousands of them on a GPU, without a copy to the host.

Dimension letters: N worlds, Ta control steps, To observed steps. Importing this needs Warp.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple, final

import torch
from torch import Tensor

from flowsteer.sim.actions import ActionCheck
from flowsteer.sim.chunk import Outcome, judge_chunk, sane
from flowsteer.sim.complaints import WarnOnce, diverged, not_finite
from flowsteer.sim.errors import SimError
from flowsteer.sim.slot import window_arrays
from flowsteer.sim.start_queue import Start, StartQueue
from flowsteer.sim.tasks.mujoco_task import MujocoTask, State
from flowsteer.sim.vec_env import IDLE, Observation, StepResult, VecEnv
from flowsteer.sim.warp_worlds import WarpWorlds


class Trail(NamedTuple):
    """Of a chunk: the states [N, 1 + Ta, ...] before it and after each control step, and whether a buffer had
    overflown by then [N, Ta]."""

    states: State
    overflown: Tensor

    @property
    def before(self) -> State:
        """[N, Ta, ...]."""
        return State(*(part[:, :-1] for part in self.states))

    @property
    def after(self) -> State:
        """[N, Ta, ...]."""
        return State(*(part[:, 1:] for part in self.states))


@final
class WarpVecEnv(VecEnv):
    """`num_envs` worlds of `task` on `device`.

    All worlds step to the end of the chunk; where an episode ended inside it is found afterwards, and what follows is
    masked. The host waits for the device once per chunk, before it, for the check of the actions. A world whose state
    blows up, whose contacts or constraints did not fit, or whose reward or observation is not finite, is lost; why is
    told by a warning with the next call.

    Args:
        task, num_envs, observation_steps, device: see `flowsteer.sim.backends.Backend`.

    Raises:
        SimError: see `WarpWorlds`.
    """

    def __init__(
        self, task: MujocoTask, num_envs: int, observation_steps: int, device: torch.device | str = "cpu"
    ) -> None:
        self.spec, self.num_envs, self.observation_steps = task.spec, num_envs, observation_steps
        self.device = torch.device(device)
        self._task = task
        self._worlds = WarpWorlds(task, num_envs, self.device)
        nominal = self._worlds.fields.nominal.to(self.device)
        idle = self._tensor(IDLE, torch.int64)
        self._parked = Start(idle, self._worlds.qpos[0].clone(), self._worlds.qvel[0].clone(), nominal)
        self._queue = self._new_queue(())
        self._check = ActionCheck(self.spec, num_envs, self.device)
        self._seed = self._tensor([IDLE] * num_envs, torch.int64)
        self._steps = torch.zeros_like(self._seed)
        self._sensors = self._worlds.sensors.clone()
        self._needs = self._tensor([0, 0], torch.int64)
        self._faults = torch.zeros_like(self._needs)
        """Whether any world has blown up so far; whether any reward or observation was not finite."""
        self._tell = WarnOnce()
        self._open = True
        self._windows = {
            key: torch.zeros(shape, dtype=getattr(torch, str(dtype)), device=self.device)
            for key, (shape, dtype) in window_arrays(self.spec, num_envs, observation_steps).items()
        }

    @property
    def seeds(self) -> tuple[int, ...]:
        """See `VecEnv`; waits for the device."""
        return tuple(self._seed.tolist())

    def reset(self, seeds: Iterable[int]) -> Observation:
        """See `VecEnv`; `seeds` is read ahead."""
        self._check_open()
        with self._worlds.enough_memory():
            self._queue = self._new_queue(seeds)
            self._start(torch.ones_like(self._seed, dtype=torch.bool))
            self._queue.refill()
            return self._observation()

    def step_chunk(self, actions: Tensor) -> StepResult:
        """See `VecEnv`."""
        self._check_open()
        with self._worlds.enough_memory():
            chunks, broken = self._checked(actions)
            seed = self._seed
            active = seed != IDLE
            trail = self._simulate(chunks)
            ran = active & ~broken
            outcome = self._judge(chunks, trail, ran)
            self._remember(trail.after, outcome.env_steps - outcome.lost.long())
            outcome = self._checked_for_faults(outcome, trail, ran)
            lost = broken | outcome.lost
            self._steps = self._steps + outcome.env_steps
            self._sensors = trail.states.sensors[:, -1]
            final_obs = self._observation()
            self._start(outcome.terminated | outcome.truncated | lost)
            # The device is busy with all of the above by now.
            self._queue.refill()
            info = {name: getattr(outcome, name) for name in ("reward_max", "env_steps", "success")}
            info |= {"seed": seed.clone(), "active": active, "lost": lost}
            return StepResult(
                self._observation(), outcome.reward_sum, outcome.terminated, outcome.truncated, final_obs, info
            )

    def close(self) -> None:
        """See `VecEnv`."""
        if self._open:
            self._complain(*torch.cat([self._needs, self._faults]).tolist())
            self._open = False
            self._worlds.close()

    def _check_open(self) -> None:
        if not self._open:
            raise SimError(f"{self.spec.name}: this environment is closed")

    def _checked(self, actions: Tensor) -> tuple[Tensor, Tensor]:
        """See `Checked`; waits for the device, once for all that the host wants to know."""
        chunks, broken, hopeless = self._check(actions, self._seed != IDLE)
        news = torch.stack([hopeless.long(), broken.any().long(), self._queue.taken, *self._needs, *self._faults])
        refused, some, taken, *found = news.tolist()
        self._complain(*found)
        self._check.refuse(bool(refused))
        self._check.warn(bool(some))
        self._queue.drop(taken)
        return chunks, broken

    def _simulate(self, chunks: Tensor) -> Trail:
        worlds, steps = self._worlds, chunks.shape[1]
        controls = self._task.control(torch, chunks).float()
        now = State(worlds.qpos, worlds.qvel, worlds.sensors)
        states = State(*(torch.empty(len(part), 1 + steps, part.shape[1], device=self.device) for part in now))
        for past, part in zip(states, (worlds.qpos, worlds.qvel, self._sensors), strict=True):
            past[:, 0] = part
        overflown = torch.empty(self.num_envs, steps, dtype=torch.bool, device=self.device)
        worlds.forget_overflow()
        for t in range(steps):
            worlds.ctrl.copy_(controls[:, t])
            worlds.step()
            for past, part in zip(states, now, strict=True):
                past[:, t + 1] = part
            overflown[:, t] = worlds.overflown()
        self._needs = torch.maximum(self._needs, worlds.needs())
        return Trail(states, overflown)

    def _judge(self, chunks: Tensor, trail: Trail, worlds: Tensor) -> Outcome:
        """What the chunk was worth in `worlds`, a mask [N]; zeros elsewhere."""
        sound = sane(torch, trail.after) & ~trail.overflown
        steps_left = self.spec.max_episode_steps - self._steps
        judged = judge_chunk(torch, self._task, trail.before, chunks, trail.after, steps_left, sound)
        return Outcome(*(torch.where(worlds, part, torch.zeros_like(part)) for part in judged))

    def _checked_for_faults(self, outcome: Outcome, trail: Trail, worlds: Tensor) -> Outcome:
        """Lose the episodes of which a reward or observation is not finite; `worlds` is a mask [N]."""
        finite = outcome.reward_sum.isfinite()
        for window in self._windows.values():
            finite = finite & window.flatten(1).sum(1).isfinite()
        faulty = worlds & ~finite
        blown_up = outcome.lost & finite & ~trail.overflown.any(1)
        self._faults = torch.maximum(self._faults, torch.stack([blown_up.any(), faulty.any()]).long())
        return outcome._replace(
            terminated=outcome.terminated & ~faulty, truncated=outcome.truncated & ~faulty, lost=outcome.lost | faulty
        )

    def _remember(self, after: State, steps: Tensor) -> None:
        """Append the observations of the first steps [N] to the windows."""
        recent = steps[:, None] + torch.arange(self.observation_steps, device=self.device)
        for key, new in self._task.observe(torch, after).items():
            window = self._windows[key]
            seen = torch.cat([window, new.to(window.dtype)], dim=1)
            rows = recent.view(*recent.shape, *(1,) * (seen.ndim - 2))
            self._windows[key] = seen.take_along_dim(rows, dim=1)

    def _start(self, worlds: Tensor) -> None:
        """Begin the next episodes in the worlds of the mask [N]."""
        start = self._queue.take(worlds)
        self._seed = torch.where(worlds, start.seed, self._seed)
        self._steps = torch.where(worlds, 0, self._steps)
        self._worlds.restart(worlds, start)
        if self._sensors.shape[1]:
            self._worlds.sense()
            self._sensors = torch.where(worlds[:, None], self._worlds.sensors, self._sensors)
        begun = worlds & (start.seed != IDLE)
        for key, first in self._task.observe(torch, State(start.qpos, start.qvel, self._sensors)).items():
            window = self._windows[key]
            mask = begun.view(-1, *(1,) * (window.ndim - 1))
            self._windows[key] = torch.where(mask, first.to(window.dtype)[:, None], window)

    def _complain(self, contacts: int, constraints: int, blown_up: int, faulty: int) -> None:
        """Warn of what has cost episodes so far, once of each."""
        name = self.spec.name
        self._tell([*self._worlds.complaints(contacts, constraints), *blown_up * [diverged(name)]])
        self._tell(faulty * [not_finite(name)])

    def _new_queue(self, seeds: Iterable[int]) -> StartQueue:
        return StartQueue(self._task, self.num_envs, seeds, self._parked, self._worlds.fields.draw)

    def _observation(self) -> Observation:
        return {key: window.clone() for key, window in self._windows.items()}

    def _tensor(self, values: Any, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=self.device)
