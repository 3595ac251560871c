"""Evaluation in simulation while a policy learns, the same for every loop."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from accelerate import Accelerator
from omegaconf import DictConfig

from flowsteer.cli.simulation import judge, make_environments
from flowsteer.policies.cloning import Evaluate
from flowsteer.policies.policy import Policy
from flowsteer.sim.evaluate import Evaluation
from flowsteer.sim.results import write_evaluation
from flowsteer.sim.tasks.base import Task

RETURN_WEIGHT = 1e-6
"""The best checkpoint has the highest success; the return only breaks ties."""


def make_evaluation(
    config: DictConfig, task: Task, observation_steps: int, folder: Path, accelerator: Accelerator, stack: ExitStack
) -> Evaluate | None:
    """Evaluation as `config.eval` and `config.sim` say, which writes to `folder`/evaluations.

    The environments are made now, so that a missing package shows before training, and closed with `stack`. None on
    the processes beside the main one, which only wait for it.
    """
    if not accelerator.is_main_process:
        return None
    options = config.eval
    env = make_environments(task, config.sim, options.episodes, observation_steps, accelerator.device)
    stack.callback(env.close)
    protocol = {"episodes": options.episodes, "seed": options.seed, "delay_steps": options.delay_steps}

    def evaluate(policy: Policy, step: int) -> tuple[dict[str, float], float]:
        result = judge(policy, env, f"judging step {step}", **protocol)
        write_evaluation(result, folder / "evaluations" / f"{step:08d}", task, options.videos)
        return numbers(result), result.success.mean + RETURN_WEIGHT * result.reward_sum.mean

    return evaluate


def numbers(result: Evaluation) -> dict[str, float]:
    """Means with their intervals, as they are logged."""
    named = {"success": result.success, "max_reward": result.max_reward, "return": result.reward_sum}
    return {
        f"eval/{name}{suffix}": value
        for name, interval in named.items()
        for suffix, value in zip(("", "_low", "_high"), interval, strict=True)
    }
