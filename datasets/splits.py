"""Which episodes train and which validate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flowsteer.datasets.errors import DataError

Mask = NDArray[np.bool_]


def split_episodes(
    num_episodes: int, val_fraction: float, seed: int, max_train_episodes: int | None = None
) -> tuple[Mask, Mask]:
    """Disjoint bool masks [E] (train, val), the same for the same seed.

    Args:
        num_episodes: E.
        val_fraction: share of validation episodes in [0, 1); above 0, both parts get at least one episode.
        seed: of the choice.
        max_train_episodes: keep at most so many training episodes; the validation episodes stay the same.

    Raises:
        DataError: if a part would be empty.
    """
    if not 0 <= val_fraction < 1:
        raise DataError(f"val_fraction must be at least 0 and below 1, got {val_fraction}")
    if num_episodes < (2 if val_fraction else 1):
        raise DataError(f"{num_episodes} episodes cannot be split: set val_fraction to 0 or record more")
    if max_train_episodes is not None and max_train_episodes < 1:
        raise DataError(f"max_train_episodes must be at least 1, got {max_train_episodes}")
    count = min(max(1, round(num_episodes * val_fraction)), num_episodes - 1) if val_fraction else 0
    order = np.random.default_rng(seed).permutation(num_episodes)
    train, val = np.zeros(num_episodes, bool), np.zeros(num_episodes, bool)
    val[order[:count]] = True
    train[order[count:][:max_train_episodes]] = True
    return train, val


def episode_mask(episodes: NDArray[Any] | Sequence[int] | None, num_episodes: int) -> Mask:
    """A bool mask [E] from a mask, episode numbers, or None for all.

    Raises:
        DataError: if it does not fit.
    """
    if episodes is None:
        return np.ones(num_episodes, bool)
    chosen = np.asarray(episodes)
    if chosen.dtype == bool:
        if chosen.shape != (num_episodes,):
            raise DataError(f"the episode mask has shape {chosen.shape}, there are {num_episodes} episodes")
        return chosen
    mask = np.zeros(num_episodes, bool)
    if chosen.size and not (chosen.min() >= 0 and chosen.max() < num_episodes):
        raise DataError(f"episode numbers must be 0 to {num_episodes - 1}, got {chosen.min()} to {chosen.max()}")
    mask[chosen.astype(np.int64)] = True
    return mask
