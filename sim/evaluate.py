"""Judge a policy: seeded episodes in a batch, one row per episode, every mean with its interval.

Dimension letters: B environments, To observed, Tp predicted, Ta executed steps, Da action width, k delay steps.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flowsteer.policies.spec import PolicySpec
from flowsteer.sim.errors import SimError, check_episodes
from flowsteer.sim.statistics import Interval, bootstrap, wilson
from flowsteer.sim.vec_env import IDLE, Observation, StepResult, VecEnv


class ActingPolicy(Protocol):
    """What a policy must offer to be evaluated."""

    spec: PolicySpec

    def predict(
        self,
        obs: Observation,
        *,
        noise: Tensor | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
    ) -> Tensor:
        """Observations {key: [B, To, ...]} -> whole chunks [B, Tp, Da], both in physical units."""


class Executor(Protocol):
    """What decides in a policy's place and may remember what it decided for each environment before."""

    def decide(
        self, obs: Observation, *, executed: Tensor, rows: Tensor, generator: Sequence[torch.Generator]
    ) -> Tensor:
        """Observations {key: [n, To, ...]} of the environments `rows` [n] -> whole chunks [n, Tp, Da].

        executed: [n] env steps since each one's last decision, 0 at the first of an episode.
        """


@final
@dataclass
class Episode:
    """One episode: its row in the results, and what it takes to show it again.

    actions: the executed actions, in order, each [Da]; with the seed they replay the episode exactly.
    decisions: (env step at which it was made, predicted chunk [Tp, Da]) of each decision.
    """

    seed: int
    success: bool = False
    reward_sum: float = 0.0
    max_reward: float = -np.inf
    length: int = 0
    terminated: bool = False
    lost: bool = False
    actions: list[NDArray[np.float32]] = field(default_factory=list)
    decisions: list[tuple[int, NDArray[np.float32]]] = field(default_factory=list)


@final
@dataclass(frozen=True)
class Evaluation:
    """Every episode of an evaluation in order of the seeds; means leave out the lost ones.

    decision_s: wall time of each batched decision, and `decision_batch` its largest batch.
    execution: the name of the way in which chunks are decided on, and `execution_options` what it was told.
    network_evaluations: per decision, in the mean; None where nobody counted.
    """

    task: str
    episodes: list[Episode]
    prediction: PolicySpec
    delay_steps: int
    decision_s: list[float]
    decision_batch: int
    wall_s: float
    execution: str = "sync"
    execution_options: Mapping[str, float | bool] = field(default_factory=dict)
    network_evaluations: float | None = None

    @property
    def kept(self) -> list[Episode]:
        """The episodes that count."""
        return [episode for episode in self.episodes if not episode.lost]

    @property
    def success(self) -> Interval:
        """Share of successful episodes."""
        return wilson(sum(episode.success for episode in self.kept), len(self.kept))

    @property
    def reward_sum(self) -> Interval:
        """Mean undiscounted return."""
        return bootstrap(np.array([episode.reward_sum for episode in self.kept]))

    @property
    def max_reward(self) -> Interval:
        """Mean of each episode's largest step reward."""
        return bootstrap(np.array([episode.max_reward for episode in self.kept]))

    @property
    def decisions(self) -> int:
        """Chunks that were decided on, those of lost episodes included."""
        return sum(len(episode.decisions) for episode in self.episodes)

    @property
    def env_steps(self) -> int:
        """Executed control steps, those of lost episodes included."""
        return sum(episode.length for episode in self.episodes)


Progress = Callable[[Episode], None]


@torch.no_grad()
def evaluate(
    policy: ActingPolicy,
    env: VecEnv,
    *,
    episodes: int,
    seed: int,
    delay_steps: int = 0,
    executor: Executor | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Run `episodes` episodes with the seeds `seed`, `seed + 1`, ...

    Each episode's noise comes from its own generator, seeded as the episode: its outcome does not depend on which
    other episodes share its batch.

    Args:
        policy: predicts chunks; the rows `policy.spec.executed` are executed.
        env: of the task that the policy is for; `env.observation_steps` must be the policy's To. Stays open.
        episodes: how many.
        seed: of the first episode.
        delay_steps: simulated inference delay k: a chunk takes effect k env steps after its observation, until then
            the previous chunk goes on. The robot waits for the first chunk of an episode.
        executor: decides in the policy's place.
        progress: called after every episode, in the order in which they end.

    Raises:
        PolicyError: the policy is for another task.
        SimError: the chunk is too short for the delay, there is nothing to do, or the seed is negative.
    """
    spec = policy.spec
    spec.check(env.spec.observations, env.spec.action_dim, env.spec.control_hz, f"task '{env.spec.name}'")
    if env.observation_steps != spec.observation_steps:
        raise SimError(f"the policy observes {spec.observation_steps} steps, the environments {env.observation_steps}")
    check_episodes(episodes, seed)
    run = _Run(_decider(policy, executor), env, _Plan(spec, env.num_envs, delay_steps), progress)
    started = time.perf_counter()
    obs = env.reset(range(seed, seed + episodes))
    while any(s != IDLE for s in env.seeds):
        obs = run.decide(obs)
    ended = [run.episodes[s] for s in range(seed, seed + episodes)]
    wall_s = time.perf_counter() - started
    return Evaluation(env.spec.name, ended, spec, delay_steps, run.decision_s, run.decision_batch, wall_s)


Decide = Callable[[Observation, Tensor, Tensor, Sequence[torch.Generator]], Tensor]
"""Observations, environments [n], env steps since their last decisions [n], generators -> chunks [n, Tp, Da]."""


def _decider(policy: ActingPolicy, executor: Executor | None) -> Decide:
    if executor is None:
        return lambda obs, rows, executed, generators: policy.predict(obs, generator=generators)
    return lambda obs, rows, executed, generators: executor.decide(
        obs, executed=executed, rows=rows, generator=generators
    )


@final
class _Plan:
    """The actions [B, Ta + k, Da] scheduled from now on; a chunk replaces those from step k on."""

    def __init__(self, spec: PolicySpec, num_envs: int, delay_steps: int) -> None:
        first, ta, tp = spec.executed.start, spec.execution_steps, spec.prediction_steps
        if delay_steps < 0 or first + ta + delay_steps > tp:
            raise SimError(
                f"delay_steps={delay_steps} needs chunks of To - 1 + Ta + k = {first + ta + delay_steps} steps, "
                f"the policy predicts {tp}; choose a delay between 0 and {tp - first - ta}"
            )
        self._first, self._executed, self._delay = first, ta, delay_steps
        self._actions = torch.zeros(num_envs, ta + delay_steps, spec.action_dim)

    def update(self, rows: Tensor, chunks: Tensor, fresh: Tensor) -> Tensor:
        """Take in chunks [n, Tp, Da] for the environments `rows`; returns the next Ta actions of all [B, Ta, Da].

        fresh: [n] bool; the first decision of an episode, which takes effect at once.
        """
        ta, k = self._executed, self._delay
        new = chunks[:, self._first : self._first + ta + k]
        late = torch.arange(ta + k) >= k
        self._actions[rows] = torch.where((late | fresh[:, None])[..., None], new, self._actions[rows])
        due = self._actions[:, :ta].clone()
        self._actions[:, :k] = self._actions[:, ta:].clone()
        return due


@final
class _Run:
    """The loop's state: which episode each environment is in, and all episodes by seed."""

    def __init__(self, decide: Decide, env: VecEnv, plan: _Plan, progress: Progress | None) -> None:
        self._decider, self._env, self._plan, self._progress = decide, env, plan, progress
        self._generators: dict[int, torch.Generator] = {}
        self._executed = torch.zeros(env.num_envs, dtype=torch.int64)
        self.episodes: dict[int, Episode] = {}
        self.decision_s: list[float] = []
        self.decision_batch = 0

    def decide(self, obs: Observation) -> Observation:
        """One decision and its Ta steps in every environment that has an episode."""
        seeds = self._env.seeds
        rows = torch.tensor([i for i, seed in enumerate(seeds) if seed != IDLE])
        running = [self._episode(seeds[i]) for i in rows.tolist()]
        fresh = torch.tensor([episode.length == 0 for episode in running])
        executed = torch.where(fresh, 0, self._executed[rows])
        seen = {key: value[rows.to(value.device)] for key, value in obs.items()}
        chunks = self._predict(seen, rows, executed, running)
        actions = self._plan.update(rows, chunks, fresh)
        result = self._env.step_chunk(actions.to(self._env.device))
        self._executed = result.info["env_steps"].cpu()
        for i, episode, chunk in zip(rows.tolist(), running, chunks.numpy(), strict=True):
            self._record(episode, chunk, actions[i].numpy(), result, i)
        return result.obs

    def _episode(self, seed: int) -> Episode:
        if seed not in self.episodes:
            self.episodes[seed] = Episode(seed)
            self._generators[seed] = torch.Generator().manual_seed(seed)
        return self.episodes[seed]

    def _predict(self, obs: Observation, rows: Tensor, executed: Tensor, running: Sequence[Episode]) -> Tensor:
        generators = [self._generators[episode.seed] for episode in running]
        started = time.perf_counter()
        chunks = self._decider(obs, rows, executed, generators).float().cpu()
        self.decision_s.append(time.perf_counter() - started)
        self.decision_batch = max(self.decision_batch, len(running))
        return chunks

    def _record(
        self,
        episode: Episode,
        chunk: NDArray[np.float32],
        actions: NDArray[np.float32],
        result: StepResult,
        i: int,
    ) -> None:
        steps = int(result.info["env_steps"][i])
        episode.decisions.append((episode.length, chunk))
        episode.actions.extend(actions[:steps])
        episode.length += steps
        episode.reward_sum += float(result.reward_sum[i])
        episode.max_reward = max(episode.max_reward, float(result.info["reward_max"][i]))
        episode.success |= bool(result.info["success"][i])
        episode.terminated = bool(result.terminated[i])
        episode.lost = bool(result.info["lost"][i])
        if result.ended[i] and self._progress is not None:
            self._progress(episode)
