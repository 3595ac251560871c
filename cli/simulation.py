"""Tasks by name, environments for an evaluation, and episodes under a bar."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from dataclasses import replace
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from flowsteer.cli.errors import UsageError, unknown
from flowsteer.cli.execution import POLICY_ITSELF, Execution
from flowsteer.configs.groups import SIMULATED
from flowsteer.configs.simulation import SimOptions
from flowsteer.datasets.progress import ProgressBar
from flowsteer.policies.build import build
from flowsteer.policies.counting import counting
from flowsteer.policies.policy import Policy
from flowsteer.sim.backends import BACKENDS, suitable
from flowsteer.sim.errors import SimError
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
        SimError: the simulator is not installed, the task does not run in that back end, or a size is out of range.
    """
    check_backend(sim)
    name = sim.backend or suitable(task)
    usual = HEAVY_ENVS if task.heavy else CHEAP_ENVS
    num_envs = min(usual if sim.num_envs is None else sim.num_envs, episodes)
    return BACKENDS[name](task, num_envs, observation_steps, workers=sim.workers, device=device)


def check_backend(sim: SimOptions | DictConfig) -> None:
    """Refuse a back end that there is not.

    Raises:
        UsageError: naming the nearest.
    """
    if sim.backend is not None and sim.backend not in BACKENDS:
        raise unknown("sim.backend", sim.backend, BACKENDS)


def run_episodes(
    policy: Policy,
    task: Task,
    sim: SimOptions | DictConfig,
    *,
    episodes: int,
    seed: int,
    delay_steps: int = 0,
    execution: Execution = POLICY_ITSELF,
    device: torch.device,
) -> Evaluation:
    """Judge `policy` in `task` over `episodes` seeds from `seed` on, with a bar."""
    with closing(make_environments(task, sim, episodes, policy.spec.observation_steps, device)) as environments:
        protocol = {"episodes": episodes, "seed": seed, "delay_steps": delay_steps}
        return judge(policy, environments, "judging", execution=execution, **protocol)


def judge(
    policy: Policy,
    environments: VecEnv,
    label: str,
    *,
    episodes: int,
    seed: int,
    delay_steps: int,
    execution: Execution = POLICY_ITSELF,
) -> Evaluation:
    """`evaluate` under a bar with this label, the evaluations of the network counted."""
    with ProgressBar(label, episodes, "episodes") as bar, counting(policy) as counter:
        result = evaluate(
            policy,
            environments,
            episodes=episodes,
            seed=seed,
            delay_steps=delay_steps,
            executor=execution.executor,
            progress=lambda episode: bar.advance(),
        )
    counted = None if counter.evaluations is None else counter.evaluations / result.decisions
    options = dict(execution.options)
    return replace(result, execution=execution.name, execution_options=options, network_evaluations=counted)


def check_kept(result: Evaluation) -> None:
    """Refuse an evaluation that tells nothing.

    Raises:
        SimError: every episode was lost.
    """
    if not result.kept:
        raise SimError(
            f"{result.task}: all {len(result.episodes)} episodes were lost, which tells nothing of the policy: "
            f"the warnings above say why"
        )
