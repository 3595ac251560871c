"""A fine-tuning run, composed from the rooms: a policy, a task, an algorithm, the loop, evaluation."""

from __future__ import annotations

import inspect
import warnings
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from accelerate import Accelerator
from omegaconf import DictConfig

from flowsteer.cli.checks import check_not_negative, check_positive, check_seeds
from flowsteer.cli.devices import find_processes
from flowsteer.cli.errors import UsageError
from flowsteer.cli.judging import make_evaluation
from flowsteer.cli.simulation import find_task, make_environments
from flowsteer.cli.training import Outcome, check_links, open_log, plain
from flowsteer.configs.train import Horizon
from flowsteer.policies.build import build, locate
from flowsteer.policies.checkpoint import build_policy, load_policy, read_config
from flowsteer.policies.policy import Policy
from flowsteer.policies.random_state import seed_everything
from flowsteer.policies.spec import PolicySpec
from flowsteer.rl_finetune.algorithm import Algorithm
from flowsteer.rl_finetune.critic import Critic
from flowsteer.rl_finetune.fpo import UNTRAINED
from flowsteer.rl_finetune.on_policy import FIRST_SEED, OnPolicy
from flowsteer.rl_finetune.statistics import fit_to_random_actions
from flowsteer.sim.tasks.base import Task
from flowsteer.sim.vec_env import VecEnv

CLONED = "cloned_policy"
"""In a checkpoint: the "policy" that fine-tuning started from, as opposed to what it made of it."""
TARGET = "_target_"


@final
@dataclass(frozen=True)
class Start:
    """What is fine-tuned: a policy, the config that rebuilds it, and its task."""

    policy: Policy
    config: dict[str, Any]
    task: Task
    task_config: dict[str, Any]


def finetune_policy(config: DictConfig, folder: Path) -> Outcome:
    """Run or go on with the run in `folder`, which then holds checkpoints, metrics, plots and videos.

    Args:
        config: resolved, see `flowsteer.configs.finetune.FinetuneConfig`.
        folder: made if it does not exist.

    Raises:
        UsageError, PolicyError, SimError, FinetuneError: bad input, or the run cannot go on.
    """
    check_seeds(config, "seed", "eval.seed")
    check_positive(config, "eval.episodes", "train.env_steps")
    if config.eval.seed + config.eval.episodes > FIRST_SEED:
        raise UsageError(f"eval.seed must be below {FIRST_SEED}, where the seeds to learn from begin")
    check_not_negative(config, "eval.videos", "eval.delay_steps")
    if config.checkpoint is None:
        _suit_untrained(config)
    seed_everything(config.seed)
    accelerator = find_processes(config.device)
    check_links(folder)
    resumed = (folder / "last").exists()
    with ExitStack() as stack:
        start = _resumed(folder) if resumed else _from_nothing(config) if config.checkpoint is None else _cloned(config)
        evaluate = None
        if config.train.evaluate_every:
            evaluate = make_evaluation(
                config, start.task, start.policy.spec.observation_steps, folder, accelerator, stack
            )
        env = _environments(config, start, accelerator, stack)
        if config.checkpoint is None and not resumed:
            fit_to_random_actions(start.policy, env, FIRST_SEED - env.num_envs)
        loop = _loop(config, start, env, folder, accelerator)
        if resumed:
            loop.resume(folder)
        progress, began = loop.progress, loop.progress.env_steps
        log = open_log(config, folder, config.train.env_steps, began, accelerator, stack, unit="env steps")
        if accelerator.is_main_process:
            print(loop.algorithm.headline)
            print(_size_of_iteration(loop))
            _warn_of_short_iterations(loop)
        finished = loop.train(log, evaluate)
    if finished and progress.env_steps > began and not loop.update.gradient_steps:
        warnings.warn(
            f"the policy is what it was: all of {progress.iteration} iterations were for the critic alone "
            f"(train.critic_warmup={config.train.critic_warmup}): raise train.env_steps",
            stacklevel=2,
        )
    return Outcome(finished, progress.env_steps, progress.best_score or 0.0, began)


def _suit_untrained(config: DictConfig) -> None:
    """Options of the algorithm that were left open, for a policy that has learnt nothing."""
    for name, value in UNTRAINED.items():
        if name in config.algo and config.algo[name] is None:
            config.algo[name] = value


def _size_of_iteration(loop: OnPolicy) -> str:
    steps, each = loop.algorithm.policy.spec.execution_steps, f"{loop.config.decisions} in each of {loop.env.num_envs}"
    return f"an iteration: {loop.decisions:,} chunks of {steps} env steps, {each} environments"


def _warn_of_short_iterations(loop: OnPolicy) -> None:
    """Say that no episode can end, where all are cut before: a reward at their ends would never be met."""
    config, env = loop.config, loop.env
    iterations = min(every for every in (config.restart_every, config.save_every, config.evaluate_every) if every)
    steps = iterations * config.decisions * loop.algorithm.policy.spec.execution_steps
    if steps < env.spec.max_episode_steps:
        warnings.warn(
            f"episodes start anew after {steps} steps, before the {env.spec.max_episode_steps} of task "
            f"'{env.spec.name}' are over, so that what happens later is never seen: raise train.decisions, or "
            "train.restart_every, evaluate_every and save_every",
            stacklevel=2,
        )


def _cloned(config: DictConfig) -> Start:
    """The policy of a checkpoint, and the task that it was cloned on unless another is given."""
    if config.policy is not None:
        raise UsageError(
            "checkpoint= brings its own policy: leave policy= out, or leave checkpoint= out to learn from nothing"
        )
    checkpoint = Path(config.checkpoint)
    stored = read_config(checkpoint)
    known = stored if config.task is None else plain(config)
    task, policy = find_task(None, known), load_policy(checkpoint)
    _take_horizon(config, policy.spec)
    return Start(policy, stored["policy"], task, known["task"])


def _take_horizon(config: DictConfig, spec: PolicySpec) -> None:
    """The horizon is the checkpoint's; what is said of it must not be another one."""
    own = {name: getattr(spec, name) for name in config.horizon}
    said = {name: value for name, value in config.horizon.items() if value != getattr(Horizon(), name)}
    other = [name for name, value in said.items() if value != own[name]]
    if other:
        raise UsageError(f"horizon.{other[0]} is the checkpoint's, {own[other[0]]}: leave it out")
    config.horizon.update(own)


def _from_nothing(config: DictConfig) -> Start:
    """An untrained policy for a task.

    Raises:
        UsageError: none is chosen.
    """
    if config.task is None or config.policy is None or TARGET not in config.policy:
        raise UsageError(
            "checkpoint= is missing: name a run folder of flowsteer train, "
            "or learn from nothing with task=NAME and policy=NAME"
        )
    task: Task = build(config.task)
    spec = task.spec
    policy_spec = PolicySpec(
        dict(spec.observations),
        spec.action_dim,
        control_hz=spec.control_hz,
        discrete=spec.discrete,
        **config.horizon,
    )
    described = plain(config)
    return Start(build(config.policy, spec=policy_spec), described["policy"], task, described["task"])


def _resumed(folder: Path) -> Start:
    """What the run started from; its weights come with the state of the loop."""
    stored = read_config(folder)
    if CLONED not in stored:
        raise UsageError(f"{folder} is not a run of flowsteer finetune: go on with flowsteer train resume={folder}")
    policy = build_policy({**stored, "policy": stored[CLONED]})
    return Start(policy, stored[CLONED], find_task(None, stored), stored["task"])


def _environments(config: DictConfig, start: Start, accelerator: Accelerator, stack: ExitStack) -> VecEnv:
    """Environments to learn in, whose reward may be another than the one that evaluation reports."""
    task: Task = build({**start.task_config, **start.task.training_options, **plain(config)["learn_in"]})
    env = make_environments(
        task, config.sim, config.train.env_steps, start.policy.spec.observation_steps, accelerator.device
    )
    stack.callback(env.close)
    start.policy.spec.check(env.spec.observations, env.spec.action_dim, env.spec.control_hz, f"task '{env.spec.name}'")
    return env


def _algorithm(config: DictConfig, policy: Policy) -> Algorithm:
    """The algorithm, if its options fit it and its policy.

    Raises:
        UsageError: it takes no exploration, or an encoder that has learnt nothing would stay as it is.
    """
    target = locate(config.algo[TARGET])
    if "exploration" in config.algo and "exploration" not in inspect.signature(target).parameters:
        raise UsageError(f"{target.__name__} explores by itself: leave exploration= out")
    algorithm: Algorithm = build(config.algo, policy=policy)
    untrained = config.checkpoint is None and any(True for _ in policy.encoder.parameters())
    if untrained and not algorithm.train_encoder:
        raise UsageError("an encoder that starts from nothing must learn: set algo.train_encoder=true")
    return algorithm


def _loop(config: DictConfig, start: Start, env: VecEnv, folder: Path, accelerator: Accelerator) -> OnPolicy:
    spec, policy = start.policy.spec, start.policy
    algorithm = _algorithm(config, policy)
    critic: Critic = build(config.critic)(spec.observation_steps * policy.encoder.feature_dim)
    describe = {
        "task": start.task_config,
        "horizon": plain(config)["horizon"],
        "policy": algorithm.describe(start.config),
        "spec": spec.to_dict(),
        CLONED: start.config,
        "finetune": plain(config),
    }
    return OnPolicy(
        algorithm,
        critic,
        env,
        build(config.train),
        seed=config.seed,
        accelerator=accelerator,
        folder=folder,
        describe=describe,
    )
