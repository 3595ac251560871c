"""Physical units <-> the roughly [-1, 1] units that networks see; part of every policy's weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from flowsteer.policies.choices import pick
from flowsteer.policies.errors import PolicyError


class KeyStatistics(Protocol):
    """Exact statistics of one key over the training split, each as long as the key's channels."""

    @property
    def min(self) -> NDArray[np.float64]:
        """Smallest value."""

    @property
    def max(self) -> NDArray[np.float64]:
        """Largest value."""

    @property
    def mean(self) -> NDArray[np.float64]:
        """Mean."""

    @property
    def std(self) -> NDArray[np.float64]:
        """Standard deviation of the population."""


Affine = tuple[NDArray[np.float64], NDArray[np.float64]]
"""scale, offset of x -> scale x + offset."""

CONSTANT = 1e-7
"""A channel whose range is below this share of its magnitude is constant: it is only shifted, never scaled."""


def _affine(center: NDArray[np.float64], spread: NDArray[np.float64], stats: KeyStatistics) -> Affine:
    magnitude = np.maximum(1.0, np.maximum(np.abs(stats.min), np.abs(stats.max)))
    scale = 1.0 / np.where(stats.max - stats.min <= CONSTANT * magnitude, 1.0, spread)
    return scale, -center * scale


def min_max(stats: KeyStatistics) -> Affine:
    """Map [min, max] onto [-1, 1]; a constant channel to 0."""
    return _affine((stats.max + stats.min) / 2, (stats.max - stats.min) / 2, stats)


def mean_std(stats: KeyStatistics) -> Affine:
    """Map to zero mean and unit standard deviation; a constant channel to 0."""
    return _affine(stats.mean, stats.std, stats)


def identity(stats: KeyStatistics) -> Affine:
    """Leave the values alone."""
    return np.ones_like(stats.mean), np.zeros_like(stats.mean)


KINDS: dict[str, Callable[[KeyStatistics], Affine]] = {"min_max": min_max, "mean_std": mean_std, "identity": identity}


@final
class Normalizer(nn.Module):
    """An affine map per key and channel.

    Args:
        widths: channels of each key, in the shape that `normalize` gets on its last axes (flattened).
    """

    def __init__(self, widths: Mapping[str, int]) -> None:
        super().__init__()
        self.widths = dict(widths)
        for key, width in widths.items():
            # Not a number until `fit` or a checkpoint fills it: an unfitted normaliser can never pass values through.
            self.register_buffer(_name("scale", key), torch.full((width,), torch.nan))
            self.register_buffer(_name("offset", key), torch.full((width,), torch.nan))

    def fit(self, statistics: Mapping[str, KeyStatistics], kinds: Mapping[str, str]) -> None:
        """Fill in the maps; `kinds` names "min_max" (the default of a key), "mean_std" or "identity" per key.

        Raises:
            PolicyError: a key or kind is missing, a width is wrong, or a statistic is not finite.
        """
        for key, width in self.widths.items():
            stats = _checked(statistics, key, width)
            kind = kinds.get(key, "min_max")
            scale, offset = pick(KINDS, kind, f"the normaliser of key '{key}'")(stats)
            self.scale(key).copy_(torch.from_numpy(scale).flatten())
            self.get_buffer(_name("offset", key)).copy_(torch.from_numpy(offset).flatten())

    def fit_levels(
        self, statistics: Mapping[str, KeyStatistics], key: str, channels: Sequence[int], level: float
    ) -> None:
        """Map the two values of some channels onto -level and level, whatever the kind of their key."""
        stats, index = statistics[key], list(channels)
        # A channel that never changes gets a width, or its two levels would be one apart from it.
        half = np.maximum((stats.max - stats.min) / 2, 1e-3 * np.maximum(1.0, np.abs(stats.max)))
        scale = torch.from_numpy(level / half).flatten()[index]
        middle = torch.from_numpy((stats.max + stats.min) / 2).flatten()[index]
        self.scale(key)[index] = scale.float()
        self.get_buffer(_name("offset", key))[index] = (-middle * scale).float()

    def check(self) -> None:
        """Raise PolicyError unless every map is finite (fitted or loaded)."""
        for name, value in self.named_buffers():
            if not bool(torch.isfinite(value).all()):
                raise PolicyError(f"the normaliser's {name} is not finite: fit it on data or load a checkpoint")

    def scale(self, key: str) -> Tensor:
        """Network units per physical unit, one for each channel of the key."""
        return self.get_buffer(_name("scale", key))

    def normalize(self, key: str, x: Tensor) -> Tensor:
        """Physical -> network units; `x` [..., width] or [..., *shape] with the key's number of channels."""
        scale, offset = self._map(key, x)
        return x * scale + offset

    def unnormalize(self, key: str, x: Tensor) -> Tensor:
        """Network -> physical units."""
        scale, offset = self._map(key, x)
        return (x - offset) / scale

    def _map(self, key: str, x: Tensor) -> tuple[Tensor, Tensor]:
        if key not in self.widths:
            raise PolicyError(f"the normaliser has no key '{key}'; it knows {sorted(self.widths)}")
        width, axes, channels = self.widths[key], 1, x.shape[-1] if x.ndim else 0
        while channels < width and axes < x.ndim:
            axes += 1
            channels *= x.shape[-axes]
        if channels != width:
            raise PolicyError(f"key '{key}' has {width} channels, got an array of shape {tuple(x.shape)}")
        shape = x.shape[x.ndim - axes :]
        return self.scale(key).view(shape), self.get_buffer(_name("offset", key)).view(shape)


def _name(what: str, key: str) -> str:
    # LeRobot's keys have dots, which no buffer's name may have.
    return f"{what}:{key.replace('.', ':')}"


def _checked(statistics: Mapping[str, KeyStatistics], key: str, width: int) -> KeyStatistics:
    if key not in statistics:
        raise PolicyError(f"no statistics for key '{key}'; the data set offers {sorted(statistics)}")
    stats = statistics[key]
    for name in ("min", "max", "mean", "std"):
        value = getattr(stats, name)
        if value.size != width:
            raise PolicyError(f"key '{key}' has {width} channels, its {name} has {value.size}")
        if not np.isfinite(value).all():
            raise PolicyError(f"the {name} of key '{key}' is not finite: look at it with `flowsteer data inspect`")
    return stats
