"""Training windows over demonstrations, gathered a whole batch at a time.

A window is one chunk as `policies/spec.py` lays it out: it starts at the first observed step, its To first rows are
observed, all Tp rows are predicted. Where it reaches over an episode's edge, the first or last step repeats::

    start           -(To-1)                 ...                 L - Tp + Ta - 1
    episode rows    0 0 1 2 ... Tp-To                           ... L-2 L-1 L-1 L-1

so that the first window has the episode's first step as its newest observation, and the last one has Ta - 1 repeated
rows at its end (Diffusion Policy's pad_before = To - 1 and pad_after = Ta - 1). An episode too short for that gives
the one window that starts it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flowsteer.datasets.errors import DataError
from flowsteer.datasets.replay_buffer import ACTION, Array, ReplayBuffer, is_image, rows
from flowsteer.datasets.splits import episode_mask

Batch = dict[str, Any]
"""{"obs": {key: Tensor [B, To, ...]}, "action": Tensor [B, Tp, Da]}; float32, images uint8."""


@final
class Windows:
    """W windows of the chosen episodes of a buffer.

    Args:
        buffer: where from. Arrays in memory are turned into contiguous float32 (images stay uint8) once; others are
            read row by row where they lie.
        observation_keys, action_key: what a batch holds.
        observation_steps, prediction_steps, execution_steps: To, Tp, Ta with To - 1 + Ta <= Tp.
        episodes: bool [E] mask or episode numbers; None takes all.

    Raises:
        DataError: for a missing key, impossible sizes, or no episode.
    """

    def __init__(
        self,
        buffer: ReplayBuffer,
        observation_keys: Sequence[str],
        *,
        action_key: str = ACTION,
        observation_steps: int,
        prediction_steps: int,
        execution_steps: int,
        episodes: NDArray[Any] | Sequence[int] | None = None,
    ) -> None:
        _check_sizes(observation_steps, prediction_steps, execution_steps)
        self.observation_steps = observation_steps
        self.prediction_steps = prediction_steps
        self._observations = {key: _gatherable(buffer.array(key)) for key in observation_keys}
        self._actions = _gatherable(buffer.array(action_key))
        mask = episode_mask(episodes, buffer.num_episodes)
        if not mask.any():
            raise DataError(f"{buffer.source}: no episode is chosen: lower the validation share or add episodes")
        self.indices = window_indices(buffer, mask, observation_steps, prediction_steps, execution_steps)
        """Frame numbers [W, Tp]."""
        self._observed = np.ascontiguousarray(self.indices[:, :observation_steps])

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def on_disk(self) -> bool:
        """Whether a gather reads files."""
        return any(_lies_on_disk(array) for array in (self._actions, *self._observations.values()))

    def gather(self, indices: Tensor | NDArray[np.int64]) -> Batch:
        """The windows numbered `indices` (int64 [B]): {"obs": {key: [B, To, ...]}, "action": [B, Tp, Da]}.

        One indexed copy per key.
        """
        chosen = np.asarray(indices)
        observed = np.take(self._observed, chosen, axis=0)
        return {
            "obs": {key: _take(array, observed) for key, array in self._observations.items()},
            "action": _take(self._actions, np.take(self.indices, chosen, axis=0)),
        }


def window_indices(
    buffer: ReplayBuffer, mask: NDArray[np.bool_], observation_steps: int, prediction_steps: int, execution_steps: int
) -> NDArray[np.int64]:
    """Frame numbers [W, Tp] of every window of the episodes in `mask`, clipped into their episodes."""
    starts, ends = buffer.episode_starts[mask], buffer.episode_ends[mask]
    first = -(observation_steps - 1)
    last = np.maximum(ends - starts - prediction_steps + execution_steps - 1, first)
    counts = last - first + 1
    within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    frames = (np.repeat(starts, counts) + within + first)[:, None] + np.arange(prediction_steps)
    clipped: NDArray[np.int64] = frames.clip(np.repeat(starts, counts)[:, None], np.repeat(ends - 1, counts)[:, None])
    return clipped


def _check_sizes(observation_steps: int, prediction_steps: int, execution_steps: int) -> None:
    if min(observation_steps, prediction_steps, execution_steps) < 1:
        raise DataError("observation_steps, prediction_steps and execution_steps must be at least 1")
    if observation_steps - 1 + execution_steps > prediction_steps:
        raise DataError(
            f"observation_steps - 1 + execution_steps must not exceed prediction_steps, got "
            f"{observation_steps} - 1 + {execution_steps} > {prediction_steps}"
        )


def _lies_on_disk(array: Array) -> bool:
    return isinstance(array, np.memmap) or not isinstance(array, np.ndarray)


def _gatherable(array: Array) -> Array:
    """In memory: contiguous float32, images uint8. On disk: as it is."""
    if _lies_on_disk(array):
        return array
    return np.ascontiguousarray(array, dtype=None if is_image(array) else np.float32)


def _take(array: Array, frames: NDArray[np.int64]) -> Tensor:
    """array[frames] for frames [B, T]: [B, T, ...], at least one channel wide."""
    # NumPy's take copies short rows several times faster than torch's index_select.
    taken = rows(array, frames.ravel()).reshape(*frames.shape, *(array.shape[1:] or (1,)))
    return torch.from_numpy(taken if is_image(array) else taken.astype(np.float32, copy=False))
