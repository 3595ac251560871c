"""Make demonstrations: roll scripted experts, or play recorded actions again, and keep what was seen and done.

A seed determines its episode, and episodes are kept in order of their seeds: the result does not depend on the number
of workers.
"""

from __future__ import annotations

import itertools
import multiprocessing
import signal
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from flowsteer.policies.spec import configurable
from flowsteer.sim.cores import SINGLE_THREADED
from flowsteer.sim.environ import environment
from flowsteer.sim.errors import SimError, check_episodes
from flowsteer.sim.experts import Expert, Floats
from flowsteer.sim.spec import TaskSpec
from flowsteer.sim.tasks.base import Array, Arrays, SingleEnv, Task
from flowsteer.sim.tasks.robosuite import RobosuiteTask

MakeExpert = Callable[[int], Expert]
"""The expert of the episode with this seed; sent to workers, so a class or a module's function."""
Progress = Callable[[int, int], None]
"""Told after each episode: episodes kept, episodes tried."""

IN_FLIGHT = 2
"""Episodes that each worker is ahead of the one that is waited for."""


@final
@configurable
@dataclass(frozen=True)
class ActionNoise:
    """What is done differs from what the expert wants, so that demonstrations show how to recover (Laskey 2017, DART).

    std: of Gaussian noise on all actions but the last (the gripper), in the task's units.
    correlation: of the noise of one step with the step before, in [0, 1).
    pause_probability: per step, of standing still for a while, the gripper doing as wanted: actions of 0 or the last
        target again, see `TaskSpec.zero_holds`.
    pause_steps: length of such a pause.
    """

    std: float = 0.0
    correlation: float = 0.0
    pause_probability: float = 0.0
    pause_steps: int = 4

    def __post_init__(self) -> None:
        if not self.std >= 0 or not 0 <= self.correlation < 1 or not 0 <= self.pause_probability < 1:
            raise SimError(f"std must be positive or 0, correlation and pause_probability in [0, 1), got {self}")
        if self.pause_steps < 1:
            raise SimError(f"pause_steps must be at least 1, got {self.pause_steps}")


@final
class _Disturbance:
    """The noise of one episode."""

    def __init__(self, noise: ActionNoise, seed: int, spec: TaskSpec) -> None:
        self._noise, self._spec = noise, spec
        self._rng = np.random.default_rng(seed)
        self._offset = noise.std * self._rng.standard_normal(spec.action_dim - 1)
        self._pausing = 0
        self._held = np.zeros(spec.action_dim - 1) if spec.zero_holds else None
        """What keeps the robot where it is; None before the first target."""

    def __call__(self, action: Floats) -> Floats:
        """What is executed where `action` [Da] is wanted."""
        noise, rho = self._noise, self._noise.correlation
        done = action.copy()
        if self._pausing == 0 and self._rng.random() < noise.pause_probability:
            self._pausing = noise.pause_steps
        done[:-1] = self._held if self._pausing and self._held is not None else action[:-1] + self._offset
        self._pausing = max(0, self._pausing - 1)
        fresh = noise.std * self._rng.standard_normal(len(action) - 1)
        self._offset = rho * self._offset + np.sqrt(1 - rho**2) * fresh
        done = np.clip(done, self._spec.action_low, self._spec.action_high)
        if not self._spec.zero_holds:
            self._held = done[:-1]
        return done


@final
@dataclass(frozen=True)
class Rollout:
    """One episode of L steps: observations {key: [L, ...]} before each step, actions [L, Da], rewards [L]."""

    seed: int
    observations: Arrays
    actions: NDArray[np.float32]
    rewards: NDArray[np.float32]
    success: bool


@final
@dataclass(frozen=True)
class CollectedEpisodes:
    """E episodes one after another, N frames in all; the arguments of a replay buffer.

    data: observations {key: [N, ...]}, "action" [N, Da] in the task's units, "reward" [N].
    episode_ends: int64 [E], the frame after each episode's last.
    meta: plain JSON types: task, control_hz, episodes (seed and success of each), and robomimic's env_args.
    """

    data: Arrays
    episode_ends: NDArray[np.int64]
    meta: dict[str, Any]


@final
class Playback(Expert):
    """Does what was recorded."""

    def __init__(self, actions: Array) -> None:
        self._actions = actions
        self._next = iter(actions)

    def reset(self) -> None:
        """See `Expert`."""
        self._next = iter(self._actions)

    def act(self, observation: Arrays) -> Floats:
        """See `Expert`; the last action is repeated should the episode go on."""
        return np.asarray(next(self._next, self._actions[-1]), dtype=np.float64)


@final
@dataclass(frozen=True)
class _Playbacks:
    actions: Mapping[int, Array]

    def __call__(self, seed: int) -> Expert:
        return Playback(self.actions[seed])


@final
@dataclass(frozen=True)
class _Experts:
    make: Callable[[], Expert]

    def __call__(self, seed: int) -> Expert:
        return self.make()


@final
@dataclass(frozen=True)
class _Stage:
    """Everything that a worker needs to turn a seed into an episode."""

    task: Task
    make_expert: MakeExpert
    noise: ActionNoise = field(default_factory=ActionNoise)
    record_clean: bool = True

    def roll(self, env: SingleEnv, seed: int) -> Rollout:
        spec = self.task.spec
        low, high = np.array(spec.action_low), np.array(spec.action_high)
        expert, disturb = self.make_expert(seed), _Disturbance(self.noise, seed, spec)
        expert.reset()
        seen, actions, rewards, success = [env.reset(seed)], [], [], False
        for _ in range(spec.max_episode_steps):
            wanted = np.clip(expert.act(seen[-1]), low, high)
            done = disturb(wanted)
            step = env.step(done.astype(np.float32))
            actions.append(wanted if self.record_clean else done)
            rewards.append(step.reward)
            success |= step.success
            if step.terminated:
                break
            seen.append(step.observation)
        observations = {key: np.stack([o[key] for o in seen[: len(actions)]]) for key in spec.observations}
        return Rollout(seed, observations, np.array(actions, np.float32), np.array(rewards, np.float32), success)


def collect(
    task: Task,
    expert: Callable[[], Expert],
    *,
    episodes: int,
    seed: int,
    num_workers: int = 1,
    noise: ActionNoise | None = None,
    record_clean: bool = True,
    only_successful: bool = True,
    progress: Progress | None = None,
) -> CollectedEpisodes:
    """Roll an expert in the episodes `seed`, `seed + 1`, ... until `episodes` are kept.

    Args:
        task: where.
        expert: makes the expert; sent to workers, so a class or a module's function.
        episodes: how many to keep.
        seed: of the first episode, and of its noise.
        num_workers: processes; 0 and 1 roll in this one.
        noise: on the executed actions.
        record_clean: keep what the expert wanted, not what noise made of it: cloning then learns to recover.
        only_successful: leave out failed episodes; the next seeds take their places.
        progress: told after each episode.

    Raises:
        SimError: fewer than one in four episodes succeeds, a worker dies, or `episodes` or `seed` is out of range.
    """
    check_episodes(episodes, seed)
    stage = _Stage(task, _Experts(expert), noise or ActionNoise(), record_clean)
    limit = 4 * episodes + 20
    kept: list[Rollout] = []
    with closing(_rollouts(stage, range(seed, seed + limit), num_workers)) as rollouts:
        for tried, rollout in enumerate(rollouts, 1):
            if rollout.success or not only_successful:
                kept.append(rollout)
            if progress is not None:
                progress(len(kept), tried)
            if len(kept) == episodes:
                return _joined(task, kept)
    raise SimError(
        f"{task.spec.name}: only {len(kept)} of {limit} episodes succeeded (seeds {seed} to {seed + limit - 1}); "
        "lower the noise, or keep failed episodes too with only_successful=False"
    )


def record(
    task: Task, actions: Mapping[int, Array], *, num_workers: int = 1, progress: Progress | None = None
) -> CollectedEpisodes:
    """Play episodes again, to keep every step of what an evaluation only judged, or to see it with other cameras.

    Args:
        task: as when the actions were executed; what it observes may differ (`lift_image` for actions from `lift`).
        actions: {seed: executed actions [L, Da]}, such as `Episode.seed` and `Episode.actions` of an evaluation.
        num_workers: processes; 1 plays in this one.
        progress: told after each episode.

    Raises:
        SimError: there is nothing to play, or a worker dies.
    """
    if not actions or not all(map(len, actions.values())):
        raise SimError(f"{task.spec.name}: every episode to record needs at least one action")
    stage = _Stage(task, _Playbacks(actions))
    kept: list[Rollout] = []
    with closing(_rollouts(stage, actions, num_workers)) as rollouts:
        for rollout in rollouts:
            kept.append(rollout)
            if progress is not None:
                progress(len(kept), len(kept))
    return _joined(task, kept)


def _joined(task: Task, rollouts: list[Rollout]) -> CollectedEpisodes:
    data = {key: np.concatenate([r.observations[key] for r in rollouts]) for key in task.spec.observations}
    data["action"] = np.concatenate([r.actions for r in rollouts])
    data["reward"] = np.concatenate([r.rewards for r in rollouts])
    meta: dict[str, Any] = {
        "task": task.spec.name,
        "control_hz": task.spec.control_hz,
        "episodes": {"seed": [r.seed for r in rollouts], "success": [r.success for r in rollouts]},
    }
    if isinstance(task, RobosuiteTask):
        meta["env_args"] = task.env_args()
    return CollectedEpisodes(data, np.cumsum([len(r.actions) for r in rollouts]), meta)


def _rollouts(stage: _Stage, seeds: Iterable[int], num_workers: int) -> Generator[Rollout, None, None]:
    """Episodes in order of the seeds, whoever is done first."""
    if num_workers <= 1:
        with closing(stage.task.make()) as env:
            yield from (stage.roll(env, seed) for seed in seeds)
        return
    # One executor per worker, so that a death says whose it was.
    context = multiprocessing.get_context("spawn")
    workers = [ProcessPoolExecutor(1, context, _enter, (stage,)) for _ in range(num_workers)]
    try:
        yield from _in_order(workers, seeds)
    finally:
        for worker in workers:
            worker.shutdown(wait=True, cancel_futures=True)


def _in_order(workers: list[ProcessPoolExecutor], seeds: Iterable[int]) -> Iterator[Rollout]:
    def submit(turns: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int, Future[Rollout]]]:
        with environment(SINGLE_THREADED):  # A worker's process starts with its first episode.
            for w, seed in turns:
                yield w, seed, _submitted(workers[w], seed)

    turns = zip(itertools.cycle(range(len(workers))), seeds, strict=False)
    waiting = deque(submit(itertools.islice(turns, IN_FLIGHT * len(workers))))
    while waiting:
        w, seed, rollout = waiting.popleft()
        with _named(w, len(workers), seed):
            performed = rollout.result()
        yield performed
        waiting.extend(submit(itertools.islice(turns, 1)))


def _submitted(worker: ProcessPoolExecutor, seed: int) -> Future[Rollout]:
    try:
        return worker.submit(_perform, seed)
    except BrokenProcessPool as error:
        # It died in an episode that waits before this one, whose turn it is to say so.
        refused: Future[Rollout] = Future()
        refused.set_exception(error)
        return refused


@contextmanager
def _named(worker: int, workers: int, seed: int) -> Iterator[None]:
    """Say which worker died."""
    try:
        yield
    except BrokenProcessPool as error:
        raise SimError(f"worker {worker} of {workers} died in the episode of seed {seed}: is memory short?") from error


_stage: _Stage | None = None
_env: SingleEnv | None = None
"""In a worker process: what it was told, and its environment once the first episode has begun."""


def _enter(stage: _Stage) -> None:
    global _stage
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the main process's to handle.
    _stage = stage


def _perform(seed: int) -> Rollout:
    global _env
    assert _stage is not None
    # Made here and not in `_enter`, whose errors the executor would swallow.
    _env = _env or _stage.task.make()
    return _stage.roll(_env, seed)
