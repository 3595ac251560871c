from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from flowsteer.cli.main import main
from flowsteer.datasets.replay_buffer import ReplayBuffer
from flowsteer.datasets.zarr_store import write_zarr
from flowsteer.sim.spec import TaskSpec

TINY = (
    "policy.network.hidden=16",
    "policy.network.blocks=1",
    "policy.network.conditioning=16",
    "train.batch_size=8",
    "train.log_every=2",
    "train.warmup_steps=2",
    "train.precision=float32",
    "train.evaluate_every=0",
    "train.validate_every=0",
    "device=cpu",
)
"""A run that takes milliseconds and is the same in every process."""


@pytest.fixture(scope="session")
def tiny() -> tuple[str, ...]:
    return TINY


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six episodes of nothing in the form of Push-T from state or key points."""
    rng = np.random.default_rng(0)
    ends = np.arange(1, 7) * 20
    state = rng.uniform(0, 512, (120, 5))
    data = {"state": state, "keypoint": rng.uniform(0, 512, (120, 9, 2)), "action": state[:, :2] + 1.0}
    return write_zarr(ReplayBuffer(data, ends), tmp_path_factory.mktemp("demonstrations") / "push.zarr")


@contextmanager
def _short_episodes() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "flowsteer.sim.tasks.pusht.TaskSpec", lambda **options: TaskSpec(**options | {"max_episode_steps": 40})
        )
        yield


@pytest.fixture(scope="module")
def short_episodes() -> Iterator[None]:
    """Push-T ends after 40 steps instead of 300, whose physics and video take seconds."""
    with _short_episodes():
        yield


@pytest.fixture(scope="session")
def trained(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with 4 steps and an evaluation."""
    pytest.importorskip("gym_pusht")
    folder = tmp_path_factory.mktemp("runs") / "trained"
    options = ("train.steps=4", "train.evaluate_every=4", "train.validate_every=2", "eval.episodes=2", "eval.videos=1")
    with _short_episodes():
        assert main(["train", f"dataset={dataset}", f"out={folder}", *TINY, *options]) == 0
    return folder


@pytest.fixture
def environment() -> dict[str, str]:
    """Of subprocesses."""
    return {**os.environ, "OMP_NUM_THREADS": "1"}
