"""`flowsteer bench sim`: env steps per second of each back end, beside Gymnasium's vector environments."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import count, product
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from matplotlib.figure import Figure
from omegaconf import DictConfig, OmegaConf

from flowsteer.cli.bench import benchmark
from flowsteer.cli.checks import check_filled, check_positive
from flowsteer.cli.errors import UsageError, unknown
from flowsteer.configs.groups import SIMULATED
from flowsteer.policies.build import build
from flowsteer.sim.backends import ANY_TASK, BACKENDS
from flowsteer.sim.cores import usable_cores
from flowsteer.sim.errors import optional_module
from flowsteer.sim.files import replacing
from flowsteer.sim.tasks.base import Task
from flowsteer.sim.tasks.mujoco_task import MujocoTask

GYMNASIUM = {"hopper": "Hopper-v5", "walker2d": "Walker2d-v5", "halfcheetah": "HalfCheetah-v5"}
"""Tasks that Gymnasium has as well."""
BARE = "bare mujoco.rollout"


@final
@dataclass
class SimBenchmark:
    """What to step with uniformly random actions.

    Attributes:
        tasks: names as in `flowsteer eval`.
        backends: each that a task can run in.
        num_envs: batch sizes.
        chunk_steps: control steps in a chunk.
        seconds: measured time of each contender in each of three rounds, of which the middle one counts.
    """

    tasks: list[str] = field(default_factory=lambda: ["hopper"])
    backends: list[str] = field(default_factory=lambda: ["gym", "threads"])
    num_envs: list[int] = field(default_factory=lambda: [1, 16, 64])
    chunk_steps: int = 4
    seconds: float = 2.0
    out: str | None = None


Advance = Callable[[], int]
"""Step once, by a chunk; returns the env steps done."""
ROUNDS = 3


def measure(config: DictConfig) -> dict[str, Any]:
    """`rows`: one per task, batch size and contender; ratios are to Gymnasium's vector environments of that batch."""
    check_filled(config, "tasks", "backends")
    check_positive(config, "num_envs", "chunk_steps", "seconds")
    rows: list[dict[str, Any]] = []
    for name, num_envs in product(config.tasks, config.num_envs):
        rates = _race(_task(name), num_envs, config)
        rows += [
            {
                "task": name,
                "num_envs": num_envs,
                "contender": contender,
                "env_steps_per_s": rate,
                **{
                    f"x_{other}": rate / rates[f"gymnasium {other}"] for other in ("sync", "async") if name in GYMNASIUM
                },
            }
            for contender, rate in rates.items()
        ]
    return {"rows": rows, "chunk_steps": config.chunk_steps}


def _task(name: str) -> Task:
    if name not in SIMULATED:
        raise unknown("task", name, SIMULATED)
    task: Task = build(OmegaConf.structured(SIMULATED[name]))
    return task


def _race(task: Task, num_envs: int, config: DictConfig) -> dict[str, float]:
    """Env steps per second of each contender; they take turns, so that a disturbance meets all of them."""
    with ExitStack() as stack:
        contenders = {name: stack.enter_context(start) for name, start in _contenders(task, num_envs, config).items()}
        rates: dict[str, list[float]] = {name: [] for name in contenders}
        for _ in range(ROUNDS):
            for name, advance in contenders.items():
                rates[name].append(_rate(advance, config.seconds))
    return {name: float(np.median(measured)) for name, measured in rates.items()}


def _contenders(task: Task, num_envs: int, config: DictConfig) -> Mapping[str, Any]:
    found: dict[str, Any] = {}
    for backend in config.backends:
        if backend not in BACKENDS:
            raise unknown("backend", backend, BACKENDS)
        if backend in ANY_TASK or isinstance(task, MujocoTask):
            found[backend] = _ours(task, backend, num_envs, config.chunk_steps)
    if isinstance(task, MujocoTask):
        found[BARE] = _bare(task, num_envs, config.chunk_steps)
    if task.spec.name in GYMNASIUM:
        for kind in ("sync", "async"):
            found[f"gymnasium {kind}"] = _gymnasium(task, kind, num_envs, config.chunk_steps)
    if not found:
        raise UsageError(f"task '{task.spec.name}' runs in none of the back ends {', '.join(config.backends)}")
    return found


def _rate(advance: Advance, seconds: float) -> float:
    advance()
    done, start = 0, time.perf_counter()
    while (passed := time.perf_counter() - start) < seconds:
        done += advance()
    return done / passed


def _chunks(task: Task, num_envs: int, chunk_steps: int) -> Iterator[Any]:
    """A few random chunks [B, Ta, Da], over and over."""
    rng = np.random.default_rng(0)
    low, high = np.array(task.spec.action_low), np.array(task.spec.action_high)
    chunks = [rng.uniform(low, high, (num_envs, chunk_steps, len(low))).astype(np.float32) for _ in range(32)]
    return (chunks[i % len(chunks)] for i in count())


@contextmanager
def _ours(task: Task, backend: str, num_envs: int, chunk_steps: int) -> Iterator[Advance]:
    chunks = (torch.from_numpy(chunk) for chunk in _chunks(task, num_envs, chunk_steps))
    with BACKENDS[backend](task, num_envs, 1) as env:
        env.reset(count())
        yield lambda: int(env.step_chunk(next(chunks)).info["env_steps"].sum())


@contextmanager
def _bare(task: MujocoTask, num_envs: int, chunk_steps: int) -> Iterator[Advance]:
    """The physics alone, of worlds that are never judged and go on from where they started."""
    mujoco = optional_module("mujoco", "mujoco")
    rollout = optional_module("mujoco.rollout", "mujoco")
    model = task.model()
    threads = min(num_envs, usable_cores())
    data = [mujoco.MjData(model) for _ in range(threads)]
    qpos, qvel = task.initial(np, task.draws(range(num_envs)))
    states = np.concatenate([np.zeros((num_envs, 1)), qpos, qvel, np.zeros((num_envs, model.na))], axis=1)
    chunks = _chunks(task, num_envs, chunk_steps)
    with rollout.Rollout(nthread=threads) as pool:

        def advance() -> int:
            control = np.repeat(np.asarray(task.control(np, next(chunks)), np.float64), task.frame_skip, axis=1)
            pool.rollout(model, data, states, control)
            return num_envs * chunk_steps

        yield advance


@contextmanager
def _gymnasium(task: Task, kind: str, num_envs: int, chunk_steps: int) -> Iterator[Advance]:
    """Steps in which a finished environment is only reset count as well, to its advantage."""
    gymnasium = optional_module("gymnasium", "mujoco")
    env = gymnasium.make_vec(GYMNASIUM[task.spec.name], num_envs, vectorization_mode=kind)
    chunks = _chunks(task, num_envs, chunk_steps)
    env.reset(seed=0)

    def advance() -> int:
        chunk = next(chunks)
        for step in range(chunk_steps):
            env.step(chunk[:, step])
        return num_envs * chunk_steps

    try:
        yield advance
    finally:
        env.close()


def plot(result: Mapping[str, Any], file: Path) -> None:
    """Env steps per second against the number of environments, a panel per task."""
    tasks = list(dict.fromkeys(row["task"] for row in result["rows"]))
    figure = Figure(figsize=(5 * len(tasks), 4.2), layout="constrained")
    for axes, task in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True):
        rows = [row for row in result["rows"] if row["task"] == task]
        for contender in dict.fromkeys(row["contender"] for row in rows):
            points = [(row["num_envs"], row["env_steps_per_s"]) for row in rows if row["contender"] == contender]
            axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=contender)
        axes.set(xlabel="environments", ylabel="env steps per second", title=task, xscale="log", yscale="log")
        axes.grid(alpha=0.3)
        axes.legend()
    with replacing(file) as temporary:
        figure.savefig(temporary, dpi=110)


main = benchmark(
    "sim", "Env steps per second of each back end, beside Gymnasium's vector environments.", SimBenchmark, measure, plot
)
