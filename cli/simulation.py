"""Tasks by name, environments for an evaluation, and a bar over episodes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from flowsteer.cli.errors import UsageError, unknown
from flowsteer.configs.groups import SIMULATED
from flowsteer.configs.simulation import SimOptions
from flowsteer.policies.build import build
from flowsteer.policies.policy import Policy
from flowsteer.sim.backends import BACKENDS, suitable
from flowsteer.sim.evaluate import Evaluation, evaluate
from flowsteer.sim.tasks.base import Task
from flowsteer.sim.vec_env import VecEnv

CHEAP_ENVS, HEAVY_ENVS = 50, 10
"""Environments in a batch, where nothing else is asked for: a heavy one takes seconds and 100 MB to make."""


def find_task(name: str | None, stored: Mapping[str, Any]) -> Task:
    """The task `name`, or the one that a checkpoint's config was trained on.

    Raises:
        UsageError: there is no such task, or the checkpoint was trained without one.
    """
    config = stored.get("task")
    if name is not None:
        if name not in SIMULATED:
            raise unknown("task", name, SIMULATED)
        config = OmegaConf.to_container(OmegaConf.structured(SIMULATED[name]))
    if config is None:
        raise UsageError("the checkpoint was trained without a task: say which with task=NAME")
    task: Task = build(config)
    return task


def make_environments(
    task: Task, sim: SimOptions | DictConfig, episodes: int, observation_steps: int, device: torch.device | str
) -> VecEnv:
    """A batch of environments of `task`, no more than there are episodes.

    Raises:
        UsageError: there is no such back end.
        SimError: the simulator is not installed, or the task does not run in that back end.
    """
    name = sim.backend or suitable(task)
    if name not in BACKENDS:
        raise unknown("sim.backend", name, BACKENDS)
    num_envs = min(sim.num_envs or (HEAVY_ENVS if task.heavy else CHEAP_ENVS), episodes)
    return BACKENDS[name](task, num_envs, observation_steps, workers=sim.workers, device=device)


def run_episodes(
    policy: Policy,
    task: Task,
    sim: SimOptions | DictConfig,
    *,
    episodes: int,
    seed: int,
    delay_steps: int = 0,
    device: torch.device,
) -> Evaluation:
    """Judge `policy` in `task` over `episodes` seeds from `seed` on, with a bar."""
    environments = make_environments(task, sim, episodes, policy.spec.observation_steps, device)
    with closing(environments), episode_bar(episodes) as advance:
        return evaluate(
            policy,
            environments,
            episodes=episodes,
            seed=seed,
            delay_steps=delay_steps,
            progress=lambda episode: advance(None, f"seed {episode.seed} done"),
        )


@contextmanager
def episode_bar(episodes: int) -> Iterator[Callable[[int | None, str], None]]:
    """Yield a function (episodes done, or None for one more; what to say beside the bar); on a terminal only."""
    console = Console(stderr=True)
    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=episodes)

        def advance(done: int | None, text: str) -> None:
            bar.update(task, description=text, completed=done, advance=None if done is not None else 1)

        yield advance
