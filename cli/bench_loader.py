"""`flowsteer bench loader`: training samples per second, beside a loader that builds each sample by itself."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from omegaconf import DictConfig
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from flowsteer.cli.bench import benchmark
from flowsteer.cli.checks import check_positive
from flowsteer.datasets.batches import Batches
from flowsteer.datasets.opening import open_dataset
from flowsteer.datasets.replay_buffer import ACTION, ReplayBuffer
from flowsteer.datasets.windows import Batch, Windows

To, Tp, Ta = 2, 16, 8
IMAGE, STATE = "img", "state"
EPISODES, EPISODE_FRAMES = 206, 124
ROUNDS = 3
SAMPLE_LOADER_WORKERS = (0, 2)


@final
@dataclass
class LoaderBenchmark:
    """dataset: a Push-T store with state, action and img; made up in its shape if not given.

    seconds: measured time of each contender in each of three rounds, of which the best counts.
    low_dim_batch: rows of a batch of states and actions.
    image_batch: rows of a batch with images.
    """

    dataset: str | None = None
    seconds: float = 1.0
    low_dim_batch: int = 256
    image_batch: int = 64
    out: str | None = None


@final
class SampleBySample(Dataset[Batch]):
    """The same windows, cut out and padded one at a time, as imitation learning code commonly does."""

    def __init__(
        self, buffer: ReplayBuffer, observation_keys: Sequence[str], windows: Windows, *, float_images: bool
    ) -> None:
        self.buffer, self.observation_keys, self.indices = buffer, observation_keys, windows.indices
        self.float_images = float_images

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, number: int) -> Batch:
        frames = self.indices[number]
        observed = frames[:To]
        return {
            "obs": {key: self._cut(key, observed) for key in self.observation_keys},
            "action": self._cut(ACTION, frames),
        }

    def _cut(self, key: str, frames: Any) -> Tensor:
        array, first, last = self.buffer.data[key], int(frames[0]), int(frames[-1])
        sample = np.asarray(array[first : last + 1])
        if len(sample) < len(frames):
            before, after = int((frames == first).sum()) - 1, int((frames == last).sum()) - 1
            padded = np.concatenate([np.repeat(sample[:1], before, 0), sample, np.repeat(sample[-1:], after, 0)])
            sample = padded[: len(frames)] if before else padded[-len(frames) :]
        if sample.ndim == 4 and self.float_images:
            return torch.from_numpy(np.moveaxis(sample, -1, 1).astype(np.float32) / 255)
        if sample.ndim == 4:
            return torch.from_numpy(sample)
        return torch.from_numpy(sample.astype(np.float32))


@final
@dataclass(frozen=True)
class Race:
    """What is compared: `ours` and the per-sample loader hand out the same tensors."""

    keys: tuple[str, ...]
    float_images: bool = False


RACES = {
    "low_dim": Race((STATE,)),
    "image": Race((IMAGE, STATE)),
    "image as float": Race((IMAGE, STATE), float_images=True),
}


def run(
    dataset: Path | str | None = None, *, seconds: float = 1.0, low_dim_batch: int = 256, image_batch: int = 64
) -> dict[str, Any]:
    """Measure low-dimensional and image windows of `dataset`, or of made-up data in Push-T's shape.

    Images are raced twice: as the bytes that `Batches` hands out (policies convert them on their device), and turned
    into floating [B, To, C, H, W] in 0..1 on this processor.

    Returns:
        `rows`: one per kind of data and contender, with its samples per second and their ratio to the faster
        per-sample loader's; `ratios`: those of `Batches`, for each kind; `dataset`, `batch_sizes`, `frames`.
    """
    buffer = _made_up() if dataset is None else open_dataset(dataset, keys=[STATE, ACTION, IMAGE])
    rows: list[dict[str, Any]] = []
    for kind, race in RACES.items():
        batch_size = image_batch if IMAGE in race.keys else low_dim_batch
        contenders = _contenders(buffer, race, batch_size)
        rates = {name: _best_rate(start(), batch_size, seconds) for name, start in contenders.items()}
        baseline = max(rate for name, rate in rates.items() if name.startswith("sample by sample"))
        rows += [
            {"data": kind, "loader": name, "samples_per_s": rate, "ratio": rate / baseline}
            for name, rate in rates.items()
        ]
    return {
        "rows": rows,
        "ratios": {row["data"]: row["ratio"] for row in rows if row["loader"] == "batches"},
        "dataset": "made up" if dataset is None else Path(dataset).name,
        "batch_sizes": {"low_dim": low_dim_batch, "image": image_batch},
        "frames": buffer.num_frames,
    }


def _contenders(buffer: ReplayBuffer, race: Race, batch_size: int) -> dict[str, Callable[[], Iterator[Any]]]:
    windows = Windows(buffer, race.keys, observation_steps=To, prediction_steps=Tp, execution_steps=Ta)
    chosen = torch.randint(len(windows), (batch_size,), generator=torch.Generator().manual_seed(0))
    finish = _images_as_float if race.float_images else _as_it_is
    contenders: dict[str, Callable[[], Iterator[Any]]] = {
        "bare gather": lambda: (windows.gather(indices) for indices in repeat(chosen)),
        "batches": lambda: map(finish, Batches(windows, batch_size)),
    }
    samples = SampleBySample(buffer, race.keys, windows, float_images=race.float_images)
    for workers in SAMPLE_LOADER_WORKERS:
        options = {"num_workers": workers, "persistent_workers": workers > 0}
        loader = DataLoader(samples, batch_size, shuffle=True, drop_last=True, **options)  # type: ignore[arg-type]
        contenders[f"sample by sample, {workers} workers"] = partial(_endless, loader)
    return contenders


def _as_it_is(batch: Batch) -> Batch:
    return batch


def _images_as_float(batch: Batch) -> Batch:
    """[B, To, H, W, C] bytes to [B, To, C, H, W] in 0..1 (channels last in memory), once for the batch."""
    images = (batch["obs"][IMAGE] / 255).movedim(-1, 2)
    return {**batch, "obs": {**batch["obs"], IMAGE: images}}


def _endless(loader: DataLoader[Batch]) -> Iterator[Batch]:
    while True:
        yield from loader


def _best_rate(batches: Iterator[Any], batch_size: int, seconds: float) -> float:
    for _ in range(3):
        next(batches)
    return max(_rate(batches, batch_size, seconds) for _ in range(ROUNDS))


def _rate(batches: Iterator[Any], batch_size: int, seconds: float) -> float:
    count, start = 0, time.perf_counter()
    while (passed := time.perf_counter() - start) < seconds:
        next(batches)
        count += 1
    return count * batch_size / passed


def _made_up() -> ReplayBuffer:
    generator = np.random.default_rng(0)
    frames = EPISODES * EPISODE_FRAMES
    data = {
        STATE: generator.random((frames, 5), np.float32),
        ACTION: generator.random((frames, 2), np.float32),
        IMAGE: generator.integers(0, 256, (frames, 96, 96, 3), np.uint8),
    }
    return ReplayBuffer(dict(data), np.arange(1, EPISODES + 1) * EPISODE_FRAMES)


def _measure(config: DictConfig) -> dict[str, Any]:
    names = ("seconds", "low_dim_batch", "image_batch")
    check_positive(config, *names)
    options = {name: config[name] for name in names}
    return run(config.dataset, **options)


main = benchmark("loader", "Training samples per second, beside a per-sample loader.", LoaderBenchmark, _measure)
