"""`flowsteer data collect`: demonstrations from a scripted expert or a checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from omegaconf import DictConfig, OmegaConf

from flowsteer.cli.application import Application
from flowsteer.cli.checks import check_not_negative, check_positive, check_seeds
from flowsteer.cli.devices import find_device
from flowsteer.cli.errors import UsageError, unknown
from flowsteer.cli.refusals import Composed, options
from flowsteer.cli.simulation import check_kept, find_task, run_episodes
from flowsteer.configs.collect import CollectConfig
from flowsteer.datasets.demo_hdf5 import write_robomimic
from flowsteer.datasets.progress import ProgressBar
from flowsteer.datasets.replay_buffer import ReplayBuffer
from flowsteer.datasets.zarr_store import write_zarr
from flowsteer.policies.build import build
from flowsteer.policies.checkpoint import load_policy, read_config
from flowsteer.sim.collect import CollectedEpisodes, collect, record
from flowsteer.sim.cores import usable_cores
from flowsteer.sim.experts import EXPERTS
from flowsteer.sim.tasks.base import Task

WRITERS: dict[str, Callable[[ReplayBuffer, Path], Path]] = {"zarr": write_zarr, "hdf5": write_robomimic}

OF_EXPERTS = ("noise", "record_clean")
OF_CHECKPOINTS = ("sim.backend", "sim.num_envs")


def run(config: DictConfig, folder: Path) -> None:
    """Collect."""
    collect_demonstrations(config, folder)


def collect_demonstrations(config: DictConfig, folder: Path) -> Path:
    """Write `folder`/TASK.FORMAT, say how many episodes it holds, and return its path.

    Raises:
        UsageError, SimError, DataError: bad options, a missing simulator, or the file exists already.
    """
    _check(config)
    stored = {} if config.checkpoint is None else read_config(Path(config.checkpoint))
    task = find_task(config.task, stored)
    target = folder / f"{task.spec.name}.{config.format}"
    if target.exists():
        raise UsageError(f"{target} already exists: choose another out=")
    roll = _roll_expert if config.checkpoint is None else _roll_checkpoint
    collected = roll(config, task)
    path = WRITERS[config.format](ReplayBuffer(dict(collected.data), collected.episode_ends, collected.meta), target)
    print(f"{path}: {len(collected.episode_ends)} episodes")
    return path


def _check(config: DictConfig) -> None:
    if config.format not in WRITERS:
        raise unknown("format", config.format, WRITERS)
    check_positive(config, "episodes")
    check_seeds(config, "seed")
    check_not_negative(config, "sim.workers")
    if config.checkpoint is None:
        _check_unset(config, OF_CHECKPOINTS, "a scripted expert, whose episodes run in sim.workers processes")
    else:
        _check_unset(config, OF_EXPERTS, "a checkpoint, whose own actions are recorded")


def _check_unset(config: DictConfig, names: tuple[str, ...], roller: str) -> None:
    """Refuse options that would do nothing."""
    default = OmegaConf.structured(CollectConfig)
    for name in names:
        node = OmegaConf.select(default, name)
        for option in options(node, f"{name}.") if OmegaConf.is_dict(node) else [name]:
            if OmegaConf.select(config, option) != OmegaConf.select(default, option):
                raise UsageError(f"{option} does nothing for {roller}: leave it out")


def _workers(config: DictConfig, task: Task) -> int:
    usual = usable_cores() if task.heavy else 1
    return usual if config.sim.workers is None else config.sim.workers


def _roll_expert(config: DictConfig, task: Task) -> CollectedEpisodes:
    if task.spec.name not in EXPERTS:
        raise UsageError(f"task '{task.spec.name}' has no scripted expert; tasks that have: {', '.join(EXPERTS)}")
    with ProgressBar("collecting", config.episodes, "episodes") as bar:
        return collect(
            task,
            EXPERTS[task.spec.name],
            episodes=config.episodes,
            seed=config.seed,
            num_workers=_workers(config, task),
            noise=build(config.noise),
            record_clean=config.record_clean,
            only_successful=config.only_successful,
            progress=lambda kept, tried: bar.move(kept, f"{tried} tried"),
        )


def _roll_checkpoint(config: DictConfig, task: Task) -> CollectedEpisodes:
    """Judge as many episodes as are asked for, then play those to keep again, recording every step."""
    device = find_device(config.device)
    policy = load_policy(Path(config.checkpoint), device)
    result = run_episodes(policy, task, config.sim, episodes=config.episodes, seed=config.seed, device=device)
    check_kept(result)
    kept = {e.seed: np.stack(e.actions) for e in result.kept if e.success or not config.only_successful}
    if not kept:
        raise UsageError(f"none of {config.episodes} episodes succeeded: only_successful=false keeps them all the same")
    with ProgressBar("recording", len(kept), "episodes") as bar:
        return record(task, kept, num_workers=_workers(config, task), progress=lambda kept, tried: bar.move(kept))


def default_out(composed: Composed) -> Path:
    """data/TASK-EPISODES."""
    config = composed.config
    if config.task is None and config.checkpoint is None:
        raise UsageError(f"task= is missing; tasks that have a scripted expert: {', '.join(EXPERTS)}")
    name = config.task or Path(config.checkpoint).name
    return Path("data", f"{name}-{config.episodes}")


main = Application(
    "data_collect",
    "Collect demonstrations from a scripted expert or a checkpoint.",
    CollectConfig,
    run,
    default_out,
    paths=("checkpoint",),
)
