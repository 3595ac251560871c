"""IsaacGymEnvs tasks behind the contract of this room."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from typing import final

import torch
from torch import Tensor

from flowsteer.policies.spec import ArraySpec
from flowsteer.sim.actions import ActionCheck
from flowsteer.sim.errors import SimError
from flowsteer.sim.isaac_gym import VecTask, destroy
from flowsteer.sim.spec import TaskSpec
from flowsteer.sim.vec_env import IDLE, Observation, StepResult, VecEnv

KEY = "state"
"""The observation key of `obs_buf`."""


@final
class IsaacVecEnv(VecEnv):
    """A `VecTask` that steps all of its worlds at once, as this room's vector environment.

    Written against the public sources of IsaacGymEnvs and tested on a task that obeys them; never run on Isaac Gym.

    The task raises `reset_buf` where an episode has ended and starts the next one within the following `step`, so:

    - What a step returns at an episode's end is the true last observation. It becomes `final_obs`.
    - A world cannot be stepped alone. One whose episode ended inside the chunk is stepped on under zero actions and
      looked at no more; `reset_buf` is cleared meanwhile, so that it does not start over in the middle of the chunk.
    - After the chunk, `reset_idx` starts the next episodes and `post_physics_step` computes their first observations,
      which is what the next `step` of the task would have done after its physics; `progress_buf` is then put back, and
      the other worlds keep the observations that they had. Whatever else a task counts in `post_physics_step` counts
      that once more. Noise that the task's domain randomisation adds to observations is missing in the first one.
    - Isaac sets `timeout_buf` at the last permitted step even where the episode also ends by rule there: such an
      end is truncated here, while other back ends call it terminated.
    - `max_episode_length` n means n - 1 steps to Isaac.

    Isaac draws the random numbers of all worlds from one generator, so a seed here only numbers an episode, and the
    same seed does not start the same episode again. Beyond what the task's own `step` does, nothing in the loop over a
    chunk waits for the device; reading which environments ended, after it, does.

    Isaac Lab (`ManagerBasedRLEnv`, `DirectRLEnv`) fits the same shape, with these differences: `step` returns ends by
    rule and time-outs apart (no ambiguity) and observations by group ("policy"), and counts an episode's steps in
    `episode_length_buf`; but it resets before it computes the observations that it returns, so that the true last
    observation is only there for a recorder, and worlds that end inside a chunk do start over in its middle.

    Args:
        task: whose `reset_idx` takes environments only.
        name: of the task.
        observation_steps: To.
        success: task -> [B] bool after a step. Without it no episode succeeds: IsaacGymEnvs has no such notion.
    """

    def __init__(
        self, task: VecTask, name: str, observation_steps: int, success: Callable[[VecTask], Tensor] | None = None
    ) -> None:
        if observation_steps < 1:
            raise SimError(f"observation_steps must be at least 1, got {observation_steps}")
        if len(inspect.signature(task.reset_idx).parameters) != 1:
            raise SimError(f"{name}: reset_idx takes more than env_ids, so its episodes cannot be started one by one")
        self._task, self._success = task, success or self._never
        self.spec = _spec(task, name)
        self.num_envs, self.observation_steps = task.num_envs, observation_steps
        self.device = torch.device(task.rl_device)
        self._check = ActionCheck(self.spec, self.num_envs, self.device)
        self._window = torch.zeros(self.num_envs, observation_steps, task.num_obs, device=self.device)
        self._next: Iterator[int] = iter(())
        self._seeds = [IDLE] * self.num_envs
        self._closed = False

    @property
    def seeds(self) -> tuple[int, ...]:
        """See `VecEnv`; numbers of episodes only."""
        return tuple(self._seeds)

    def reset(self, seeds: Iterable[int]) -> Observation:
        """See `VecEnv`."""
        # What Isaac derives from the state (body poses, contacts) is empty before the first physics step.
        self._task.step(torch.zeros(self.num_envs, self.spec.action_dim, device=self.device))
        self._next = iter(seeds)
        self._start(range(self.num_envs))
        return self._observation()

    def step_chunk(self, actions: Tensor) -> StepResult:
        """See `VecEnv`."""
        seeds = torch.tensor(self._seeds, device=self.device)
        checked = self._check(actions, seeds != IDLE)
        self._check.refuse(bool(checked.hopeless))
        self._check.warn(bool(checked.broken.any()))
        tally = _Tally(seeds, checked.broken)
        for action in checked.chunks.unbind(1):
            self._step(action, tally)
        final_obs = self._observation()
        ended = (tally.terminated | tally.truncated | tally.info["lost"]).nonzero()[:, 0].tolist()
        if ended:
            self._start(ended)
        obs = self._observation() if ended else final_obs
        return StepResult(obs, tally.reward_sum, tally.terminated, tally.truncated, final_obs, tally.result())

    def close(self) -> None:
        """See `VecEnv`."""
        if not self._closed:
            self._closed = True
            destroy(self._task)

    def _step(self, action: Tensor, tally: _Tally) -> None:
        """One step of all worlds, which counts for those whose episode still runs."""
        running = tally.running
        returned, reward, reset, _ = self._task.step(torch.where(running[:, None], action, 0))
        obs, timeout = returned["obs"], self._task.timeout_buf.to(self.device) != 0
        finite = obs.isfinite().all(dim=1)
        tally.add(reward, reset != 0, timeout, self._success(self._task), finite)
        self._task.reset_buf.zero_()
        shifted = torch.cat([self._window[:, 1:], obs[:, None]], dim=1)
        self._window = torch.where((running & finite)[:, None, None], shifted, self._window)

    def _start(self, indices: Iterable[int]) -> None:
        """Begin the next episodes; an environment that gets no seed keeps its last observations."""
        indices = list(indices)
        for i in indices:
            self._seeds[i] = next(self._next, IDLE)
        task = self._task
        task.reset_idx(torch.tensor(indices, device=task.progress_buf.device))
        progress = task.progress_buf.clone()
        task.post_physics_step()
        task.progress_buf.copy_(progress)
        task.reset_buf.zero_()
        first = task.obs_buf.clamp(-task.clip_obs, task.clip_obs).to(self.device)
        begun = torch.tensor([i for i in indices if self._seeds[i] != IDLE], dtype=torch.int64, device=self.device)
        self._window[begun] = first[begun][:, None]

    def _observation(self) -> Observation:
        return {KEY: self._window.clone()}

    def _never(self, task: VecTask) -> Tensor:
        return torch.zeros(self.num_envs, dtype=torch.bool, device=self.device)


@final
class _Tally:
    """What one chunk has done so far; all [B]."""

    def __init__(self, seeds: Tensor, lost: Tensor) -> None:
        no = torch.zeros_like(lost)
        active = seeds != IDLE
        self.running = active & ~lost
        self.reward_sum = torch.zeros_like(seeds, dtype=torch.float32)
        self.terminated, self.truncated = no, no
        self._reward_max = torch.full_like(self.reward_sum, -torch.inf)
        self.info = {
            "env_steps": torch.zeros_like(seeds),
            "success": no,
            "seed": seeds,
            "active": active,
            "lost": lost,
        }

    def add(self, reward: Tensor, reset: Tensor, timeout: Tensor, success: Tensor, finite: Tensor) -> None:
        """One step of those that run."""
        running, sane = self.running, finite & reward.isfinite()
        counted = running & sane
        self.reward_sum = self.reward_sum + torch.where(counted, reward, 0)
        self._reward_max = torch.where(counted, torch.maximum(self._reward_max, reward), self._reward_max)
        self.terminated = self.terminated | (counted & reset & ~timeout)
        self.truncated = self.truncated | (counted & reset & timeout)
        self.info["success"] = self.info["success"] | (counted & success)
        self.info["lost"] = self.info["lost"] | (running & ~sane)
        self.info["env_steps"] = self.info["env_steps"] + running
        self.running = counted & ~reset

    def result(self) -> dict[str, Tensor]:
        """The `info` of a `StepResult`."""
        return {**self.info, "reward_max": torch.where(self._reward_max.isfinite(), self._reward_max, 0)}


def _spec(task: VecTask, name: str) -> TaskSpec:
    return TaskSpec(
        name=name,
        observations={KEY: ArraySpec((task.num_obs,))},
        action_dim=task.num_acts,
        action_low=(-1.0,) * task.num_acts,
        action_high=(1.0,) * task.num_acts,
        control_hz=1 / (task.dt * task.control_freq_inv),
        max_episode_steps=int(task.max_episode_length) - 1,
    )
