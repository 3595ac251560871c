"""What `flowsteer bench sim` races: our back ends, the bare physics, and what others offer for the same task."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from itertools import count, cycle
from typing import Any, final

import numpy as np
import torch

from flowsteer.cli.errors import UsageError, unknown
from flowsteer.sim.backends import ANY_TASK, BACKENDS
from flowsteer.sim.cores import usable_cores
from flowsteer.sim.errors import optional_module
from flowsteer.sim.pool_env import PoolVecEnv
from flowsteer.sim.rollout_pool import RolloutPool
from flowsteer.sim.tasks.base import Array, Task
from flowsteer.sim.tasks.mujoco_task import MujocoTask
from flowsteer.sim.tasks.robosuite import Lift
from flowsteer.sim.vec_env import VecEnv

GYMNASIUM = {"hopper": "Hopper-v5", "walker2d": "Walker2d-v5", "halfcheetah": "HalfCheetah-v5"}
"""Tasks that Gymnasium has as well."""
BARE = "bare mujoco.rollout"
SYNC, ASYNC = "gymnasium sync", "gymnasium async"
ROBOSUITE = "robosuite lift"
OTHERS = {"x_bare": BARE, "x_sync": SYNC, "x_async": ASYNC, "x_robosuite": ROBOSUITE}
"""Ratio -> what it is a ratio to."""
DIFFERENT_CHUNKS = 32

Advance = Callable[[], int]
"""Step once, by a chunk; returns the env steps done."""
Lap = Callable[[float], float]
"""Run for so many seconds; returns env steps per second."""
Start = AbstractContextManager[Lap]


@final
@dataclass(frozen=True)
class Size:
    """Environments in a batch, control steps in a chunk."""

    num_envs: int
    chunk_steps: int


@final
@dataclass
class Trace:
    """What `threads` had the physics do in its last lap.

    decisions: the states [B, ...] that each chunk [B, Ta, Da] began in, and the chunk.
    env_steps: made in all of them, without those that were masked.
    """

    decisions: list[tuple[Array, Array]] = field(default_factory=list)
    env_steps: int = 0


def contenders(task: Task, backends: list[str], size: Size, device: torch.device, others: bool) -> dict[str, Start]:
    """Those that can run the task, by name, not started; `others` are Gymnasium and robosuite.

    Raises:
        UsageError: there is no such back end, or none of them runs the task.
    """
    found: dict[str, Start] = {}
    for backend in backends:
        if backend not in BACKENDS:
            raise unknown("backend", backend, BACKENDS)
        if backend == "threads" and isinstance(task, MujocoTask):
            trace = Trace()
            found |= {backend: traced_threads(task, size, trace), BARE: bare(task, size, trace)}
        elif backend in ANY_TASK or isinstance(task, MujocoTask):
            found[backend] = _ours(task, backend, size, device if backend == "warp" else torch.device("cpu"))
    if not found:
        raise UsageError(f"task '{task.spec.name}' runs in none of the back ends {', '.join(backends)}")
    if others and task.spec.name in GYMNASIUM:
        found |= {SYNC: _gymnasium(task, "sync", size), ASYNC: _gymnasium(task, "async", size)}
    if others and task.spec.name == "arm_lift":
        found[ROBOSUITE] = _robosuite(size)
    return found


def _rate(advance: Advance, seconds: float) -> float:
    advance()
    done, start = 0, time.perf_counter()
    while (passed := time.perf_counter() - start) < seconds:
        done += advance()
    return done / passed


def random_chunks(task: Task, size: Size, device: torch.device | str = "cpu") -> Iterator[torch.Tensor]:
    """A few random chunks [B, Ta, Da], over and over."""
    generator = torch.Generator().manual_seed(0)
    low, high = torch.tensor(task.spec.action_low), torch.tensor(task.spec.action_high)
    shape = DIFFERENT_CHUNKS, size.num_envs, size.chunk_steps, len(low)
    chunks = low + torch.rand(shape, generator=generator) * (high - low)
    return cycle(chunks.clip(low, high).to(device))


def _stepping(env: VecEnv, chunks: Iterator[torch.Tensor]) -> Advance:
    env.reset(count())
    return lambda: int(env.step_chunk(next(chunks)).info["env_steps"].sum())


@contextmanager
def _ours(task: Task, backend: str, size: Size, device: torch.device) -> Iterator[Lap]:
    with BACKENDS[backend](task, size.num_envs, 1, device=device) as env:
        advance = _stepping(env, random_chunks(task, size, device))
        yield lambda seconds: _rate(advance, seconds)


@contextmanager
def _robosuite(size: Size) -> Iterator[Lap]:
    """A process per core, one world in each: more worlds are not faster, and take seconds and 100 MB each."""
    cores = usable_cores()
    with _ours(Lift(), "gym", Size(min(size.num_envs, cores), size.chunk_steps), torch.device("cpu")) as lap:
        yield lap


@contextmanager
def traced_threads(task: MujocoTask, size: Size, trace: Trace) -> Iterator[Lap]:
    """The back end `threads`; what it notes of each chunk is a copy of the states."""
    pool, chunks = RolloutPool(task, size.num_envs, 1), random_chunks(task, size)
    with PoolVecEnv(task.spec, pool, size.num_envs, 1) as env:
        env.reset(count())

        def advance() -> int:
            chunk = next(chunks)
            trace.decisions.append((pool.states.copy(), chunk.numpy()))
            steps = int(env.step_chunk(chunk).info["env_steps"].sum())
            trace.env_steps += steps
            return steps

        def lap(seconds: float) -> float:
            trace.decisions.clear()
            trace.env_steps = 0
            return _rate(advance, seconds)

        yield lap


@contextmanager
def bare(task: MujocoTask, size: Size, trace: Trace) -> Iterator[Lap]:
    """The physics alone of what `threads` has just done: the same calls of `mujoco.rollout`, and nothing else.

    Both count the steps up to the end of an episode, and both make those that follow it in its chunk.
    """
    mujoco, rollout = optional_module("mujoco", "mujoco"), optional_module("mujoco.rollout", "mujoco")
    model, threads = task.model(), min(size.num_envs, usable_cores())
    data = [mujoco.MjData(model) for _ in range(threads)]
    with rollout.Rollout(nthread=threads) as pool:

        def replay(states: Array, chunk: Array) -> float:
            control = np.repeat(np.asarray(task.control(np, chunk), np.float64), task.frame_skip, axis=1)
            start = time.perf_counter()
            pool.rollout(model, data, states, control)
            return time.perf_counter() - start

        def lap(seconds: float) -> float:
            replay(*trace.decisions[0])
            return trace.env_steps / sum(replay(*decision) for decision in trace.decisions)

        yield lap


@contextmanager
def _gymnasium(task: Task, kind: str, size: Size) -> Iterator[Lap]:
    """Steps in which a finished environment is only reset count as well, to its advantage."""
    gymnasium: Any = optional_module("gymnasium", "mujoco")
    env = gymnasium.make_vec(GYMNASIUM[task.spec.name], size.num_envs, vectorization_mode=kind)
    chunks = random_chunks(task, size)
    env.reset(seed=0)

    def advance() -> int:
        chunk = next(chunks).numpy()
        for step in range(size.chunk_steps):
            env.step(chunk[:, step])
        return size.num_envs * size.chunk_steps

    try:
        yield lambda seconds: _rate(advance, seconds)
    finally:
        env.close()
