"""`flowsteer bench warp`: env steps per second of MuJoCo Warp, and where the time of a chunk goes."""

from __future__ import annotations

import functools
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import count, islice, product
from typing import Any, final

import torch
from omegaconf import DictConfig

from flowsteer.cli.bench import benchmark
from flowsteer.cli.checks import check_filled, check_positive
from flowsteer.cli.devices import find_device
from flowsteer.cli.sim_contenders import Size, random_chunks
from flowsteer.cli.simulation import find_task
from flowsteer.policies.timing import synchronize
from flowsteer.sim.backends import warp
from flowsteer.sim.tasks.base import Task
from flowsteer.sim.vec_env import VecEnv

PHYSICS, FUNCTIONS, DRAWS, COPIES, REST = "physics", "functions", "draws", "copies", "rest"
PARTS = (PHYSICS, FUNCTIONS, DRAWS, COPIES, REST)
WARM_UP_CHUNKS = 2


@final
@dataclass
class WarpBenchmark:
    """What to step with uniformly random actions.

    Attributes:
        tasks: names as in `flowsteer eval`.
        num_envs: batch sizes.
        chunk_steps: control steps in a chunk.
        chunks: measured ones, first as they are in use, then with the device stopped around every part.
        device: "auto" (a GPU where there is one) or "cpu".
        name: of the file to write.
        out: where to write it.
    """

    tasks: list[str] = field(default_factory=lambda: ["hopper", "pusht_mj"])
    num_envs: list[int] = field(default_factory=lambda: [4096])
    chunk_steps: int = 4
    chunks: int = 50
    device: str = "auto"
    name: str = "warp"
    out: str | None = None


@final
class Stopwatch:
    """Seconds of each part of what `device` does; a part inside another counts for itself alone."""

    def __init__(self, device: torch.device) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._device = device
        self._open: list[str] = []
        self._since = 0.0

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """What happens in here is `name`."""
        self._lap()
        self._open.append(name)
        try:
            yield
        finally:
            self._lap()
            self._open.pop()

    @contextmanager
    def watching(self, owner: Any, method: str, name: str) -> Iterator[None]:
        """Every call of `owner.method`, a class's or an object's, is `name`."""
        own, original = vars(owner).get(method), getattr(owner, method)

        @functools.wraps(original)
        def watched(*args: Any, **options: Any) -> Any:
            with self.part(name):
                return original(*args, **options)

        setattr(owner, method, watched)
        try:
            yield
        finally:
            if own is None:
                delattr(owner, method)
            else:
                setattr(owner, method, own)

    def _lap(self) -> None:
        synchronize(self._device)
        now = time.perf_counter()
        if self._open:
            self.seconds[self._open[-1]] += now - self._since
        self._since = now


def measure(config: DictConfig) -> dict[str, Any]:
    """`rows`: one per task and batch size."""
    check_filled(config, "tasks")
    check_positive(config, "num_envs", "chunk_steps", "chunks")
    device = find_device(config.device)
    tasks = {name: find_task(name, {}) for name in config.tasks}
    rows = [
        {
            "task": name,
            "num_envs": num_envs,
            **_measure(tasks[name], Size(num_envs, config.chunk_steps), config, device),
        }
        for name, num_envs in product(config.tasks, config.num_envs)
    ]
    return {"rows": rows, "device": device.type, "chunk_steps": config.chunk_steps, "chunks": config.chunks}


def _measure(task: Task, size: Size, config: DictConfig, device: torch.device) -> dict[str, float]:
    """Env steps per second, and milliseconds per chunk of each part where the device is stopped around it."""
    watch, chunks = Stopwatch(device), random_chunks(task, size, device)
    with warp(task, size.num_envs, 1, device=device) as env:
        env.reset(count())
        _steps(env, islice(chunks, WARM_UP_CHUNKS))
        synchronize(device)
        start = time.perf_counter()
        env_steps = _steps(env, islice(chunks, config.chunks))
        rate = env_steps / (time.perf_counter() - start)
        with watched(task, watch), watch.part(REST):
            _steps(env, islice(chunks, config.chunks))
    return {"env_steps_per_s": rate} | {f"{part}_ms": 1e3 * watch.seconds[part] / config.chunks for part in PARTS}


def _steps(env: VecEnv, chunks: Iterator[torch.Tensor]) -> int:
    """Env steps that these chunks made; the device is asked once, when all are done."""
    return int(torch.stack([env.step_chunk(chunk).info["env_steps"].sum() for chunk in chunks]).sum())


@contextmanager
def watched(task: Task, watch: Stopwatch) -> Iterator[None]:
    """Time what `task` does in MuJoCo Warp.

    `physics` is launching and running kernels or the CUDA graph; `functions` those of the task (control, judge,
    observe, initial) and the start of new episodes; `draws` their random numbers and worlds, made on the host; `copies`
    taking these to the device, and what the host reads of the device. The rest of a chunk is checks, masks, windows.
    """
    # Not at the top: these import Warp.
    from flowsteer.sim.start_queue import StartQueue
    from flowsteer.sim.warp_fields import WorldFields
    from flowsteer.sim.warp_worlds import WarpWorlds

    watched: dict[str, list[tuple[Any, str]]] = {
        PHYSICS: [(WarpWorlds, "step"), (WarpWorlds, "sense")],
        FUNCTIONS: [
            *((task, name) for name in ("control", "judge", "observe", "initial")),
            (WarpWorlds, "restart"),
            (StartQueue, "take"),
        ],
        DRAWS: [(task, "draws"), (WorldFields, "draw")],
        COPIES: [(StartQueue, "refill"), (torch.Tensor, "tolist")],
    }
    with ExitStack() as stack:
        for part, methods in watched.items():
            for owner, method in methods:
                stack.enter_context(watch.watching(owner, method, part))
        yield


main = benchmark(
    "warp", "Env steps per second of MuJoCo Warp, and where the time of a chunk goes.", WarpBenchmark, measure
)
