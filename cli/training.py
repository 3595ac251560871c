"""A cloning run, composed from the rooms: demonstrations, policy, loop, evaluation in simulation."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import numpy as np
from accelerate import Accelerator
from omegaconf import DictConfig, OmegaConf

from flowsteer.cli.checks import check_not_negative, check_positive, check_seeds
from flowsteer.cli.demonstrations import (
    Demonstrations,
    in_hindsight,
    load_demonstrations,
    make_task,
    with_mirror_images,
)
from flowsteer.cli.devices import find_processes
from flowsteer.cli.errors import UsageError
from flowsteer.cli.judging import make_evaluation
from flowsteer.cli.run_log import RunLog, Silent
from flowsteer.cli.simulation import check_backend
from flowsteer.datasets.batches import Batches, epoch_batches
from flowsteer.datasets.key_statistics import statistics, statistics_of
from flowsteer.datasets.replay_buffer import ACTION
from flowsteer.datasets.splits import Mask, split_episodes
from flowsteer.datasets.windows import Batch, Windows
from flowsteer.policies.build import build
from flowsteer.policies.cloning import Cloning, Evaluate
from flowsteer.policies.cloning_config import CloningConfig
from flowsteer.policies.policy import Policy
from flowsteer.policies.random_state import seed_everything
from flowsteer.sim.files import replacing
from flowsteer.sim.tasks.base import Task

CONFIG = "config.yaml"
STATISTICS_BATCH = 1024
"""Windows that are looked at in one go, to learn how far actions lead."""


@final
@dataclass(frozen=True)
class Outcome:
    """How a run ended: all its steps, or stopped by a signal at `step`; the best score of its evaluations.

    `start` is the step that it went on from, 0 for a new run.
    """

    finished: bool
    step: int
    best_score: float
    start: int


def is_main_process() -> bool:
    """Whether this is the first of the processes that `torchrun` or `accelerate launch` started, or the only one."""
    return int(os.environ.get("RANK", "0")) == 0


def train_policy(config: DictConfig, folder: Path) -> Outcome:
    """Run or go on with the run in `folder`, which then holds checkpoints, metrics, plots and videos.

    Args:
        config: resolved, see `flowsteer.configs.train.TrainConfig`; what build() makes of a downloaded one is safe.
        folder: made if it does not exist.

    Raises:
        UsageError, DataError, PolicyError, SimError: bad input; nothing has been written then.
    """
    check_seeds(config, "seed", "eval.seed")
    check_positive(config, "eval.episodes", "data.control_hz")
    check_not_negative(config, "eval.videos", "eval.delay_steps")
    check_backend(config.sim)
    seed_everything(config.seed)
    accelerator = find_processes(config.device)
    task = make_task(config)
    with ExitStack() as stack:
        check_links(folder)
        evaluate = _evaluate(config, task, folder, accelerator, stack)
        cloning, validation = _cloning(config, task, folder, accelerator, stack)
        return go_on(cloning, config, folder, validation, evaluate, stack)


def go_on(
    cloning: Cloning,
    config: DictConfig,
    folder: Path,
    validation: Validation | None,
    evaluate: Evaluate | None,
    stack: ExitStack,
) -> Outcome:
    """Train to the end, from where a run in `folder` ended."""
    if (folder / "last").exists():
        cloning.resume(folder)
    start = cloning.progress.step
    log = open_log(config, folder, config.train.steps, start, cloning.accelerator, stack)
    finished = cloning.train(log, validation=validation, evaluate=evaluate)
    return Outcome(finished, cloning.progress.step, cloning.progress.best_score, start)


def check_links(folder: Path) -> None:
    """Refuse a run whose links a copy or a synchroniser has dropped: starting over would delete its checkpoints."""
    checkpoints = folder / "checkpoints"
    kept = sorted(path.name for path in checkpoints.glob("[0-9]*")) if checkpoints.is_dir() else []
    if kept and not (folder / "last").exists():
        raise UsageError(
            f"{folder} has checkpoints but its link 'last' is missing: "
            f"restore it with ln -sfn checkpoints/{kept[-1]} {folder}/last"
        )


def _cloning(
    config: DictConfig, task: Task | None, folder: Path, accelerator: Accelerator, stack: ExitStack
) -> tuple[Cloning, Validation | None]:
    demonstrations, train, val = split_demonstrations(config, load_demonstrations(config, task), task)
    policy = _policy(config, demonstrations, train)
    batches, validation = make_batches(config, demonstrations, train, val, accelerator, stack)
    cloning = Cloning(
        policy,
        loop_options(config),
        batches,
        config.train.batch_size,
        seed=config.seed,
        accelerator=accelerator,
        folder=folder,
        describe={**plain(config), "spec": demonstrations.spec.to_dict()},
    )
    return cloning, validation


def make_batches(
    config: DictConfig,
    demonstrations: Demonstrations,
    train: Mask,
    val: Mask,
    accelerator: Accelerator,
    stack: ExitStack,
) -> tuple[Batches, Validation | None]:
    """This process's part of the training batches, closed with `stack`, and the validation windows if there are any."""
    size = config.train.batch_size
    batches = Batches(
        _windows(demonstrations, train),
        size,
        seed=config.seed,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        pin_memory=accelerator.device.type == "cuda",
    )
    stack.callback(batches.close)
    return batches, Validation(_windows(demonstrations, val), size) if val.any() else None


def split_demonstrations(
    config: DictConfig, demonstrations: Demonstrations, task: Task | None
) -> tuple[Demonstrations, Mask, Mask]:
    """The demonstrations and which of their episodes train and validate; mirror images only train."""
    data = config.data
    if data.hindsight:
        demonstrations = in_hindsight(demonstrations, task)
    episodes = demonstrations.buffer.num_episodes
    train, val = split_episodes(episodes, data.val_fraction, config.seed, data.max_train_episodes)
    if not data.mirror:
        return demonstrations, train, val
    doubled = with_mirror_images(demonstrations, task)
    return doubled, np.concatenate([train, train]), np.concatenate([val, np.zeros_like(val)])


def _windows(demonstrations: Demonstrations, episodes: Any, keys: Sequence[str] | None = None) -> Windows:
    spec = demonstrations.spec
    return Windows(
        demonstrations.buffer,
        list(spec.observations) if keys is None else keys,
        observation_steps=spec.observation_steps,
        prediction_steps=spec.prediction_steps,
        execution_steps=spec.execution_steps,
        episodes=episodes,
    )


def _policy(config: DictConfig, demonstrations: Demonstrations, episodes: Mask) -> Policy:
    """An untrained policy whose normaliser knows the training episodes, and what it makes of their windows' actions."""
    spec = demonstrations.spec
    policy: Policy = build(config.policy, spec=spec)
    keys = [key for key, array in spec.observations.items() if array.dtype != "uint8"]
    known = statistics(demonstrations.buffer, [*keys, ACTION], episodes)
    if policy.relative_to is not None:
        batches = epoch_batches(_windows(demonstrations, episodes, [policy.relative_to]), STATISTICS_BATCH)
        known[ACTION] = statistics_of(policy.relative(b[ACTION], b["obs"]).flatten(0, 1).numpy() for b in batches)
    policy.fit_normalizer(known)
    return policy


def loop_options(config: DictConfig) -> CloningConfig:
    """The part of `config.train` that the loop takes."""
    options: CloningConfig = build({key: value for key, value in config.train.items() if key != "batch_size"})
    return options


@final
@dataclass(frozen=True)
class Validation:
    """All validation windows, in order, at each call."""

    windows: Windows
    batch_size: int

    def __call__(self) -> Iterator[Batch]:
        """Start over."""
        return epoch_batches(self.windows, self.batch_size)


def _evaluate(
    config: DictConfig, task: Task | None, folder: Path, accelerator: Accelerator, stack: ExitStack
) -> Evaluate | None:
    if not config.train.evaluate_every:
        return None
    if task is None:
        raise UsageError("there is nothing to evaluate in: choose a task or set train.evaluate_every=0")
    return make_evaluation(config, task, config.horizon.observation_steps, folder, accelerator, stack)


def open_log(
    config: DictConfig,
    folder: Path,
    steps: int,
    start: int,
    accelerator: Accelerator,
    stack: ExitStack,
    *,
    unit: str = "steps",
) -> RunLog | Silent:
    """On the main process, the run's log from `start` to `steps`; the run's config is on disk from here on."""
    if not accelerator.is_main_process:
        return Silent()
    folder.mkdir(parents=True, exist_ok=True)
    wandb = None
    if config.log.wandb:
        wandb = {"project": config.log.project, "name": config.log.name or folder.name, "config": plain(config)}
    log = stack.enter_context(RunLog(folder, steps, unit=unit, start=start, wandb=wandb))
    with replacing(folder / CONFIG) as temporary:
        OmegaConf.save(config, temporary)
    return log


def plain(config: DictConfig) -> dict[str, Any]:
    """The config as dicts and lists."""
    values: dict[str, Any] = OmegaConf.to_container(config, resolve=True)  # type: ignore[assignment]
    return values
