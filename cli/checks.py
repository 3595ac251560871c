"""Options that several commands check before anything is made."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from flowsteer.cli.errors import UsageError, unknown

SEEDS = 2**32
"""Seeds are below it: NumPy's global generator takes no larger ones."""

WEIGHTS = ("ema", "weights")
"""Of a checkpoint: averaged, or as the optimiser left them."""


def check_positive(config: DictConfig, *names: str) -> None:
    """Refuse options that are not above 0; of a list none may be, and it may not be empty.

    Raises:
        UsageError: naming the option and its value.
    """
    _check(config, names, lambda value: value > 0, "be positive")


def check_not_negative(config: DictConfig, *names: str) -> None:
    """As `check_positive`, with 0 allowed."""
    _check(config, names, lambda value: value >= 0, "not be negative")


def check_seeds(config: DictConfig, *names: str) -> None:
    """As `check_positive`, for what seeds generators."""
    _check(config, names, lambda value: 0 <= value < SEEDS, f"be from 0 to {SEEDS - 1}")


def check_times(config: DictConfig, *names: str) -> None:
    """As `check_positive`, for times of a path: none may be above 1 either."""
    _check(config, names, lambda value: 0 < value <= 1, "be in (0, 1]")


def check_filled(config: DictConfig, *names: str) -> None:
    """Refuse empty lists.

    Raises:
        UsageError: naming the option.
    """
    for name in names:
        if not OmegaConf.select(config, name):
            raise UsageError(f"{name} is empty: give at least one, '{name}=[a,b]'")


def find_checkpoint(config: DictConfig) -> Path:
    """What `config.checkpoint` names, if `config.weights` is a part of a checkpoint.

    Raises:
        UsageError: none is named, or there is no such part.
    """
    if config.checkpoint is None:
        raise UsageError("checkpoint= is missing: name a run folder, RUN/best or RUN/checkpoints/STEP")
    if config.weights not in WEIGHTS:
        raise unknown("weights", config.weights, WEIGHTS)
    return Path(config.checkpoint)


def _check(config: DictConfig, names: tuple[str, ...], allowed: Callable[[float], bool], must: str) -> None:
    for name in names:
        for value in _numbers(config, name):
            if not allowed(value):
                raise UsageError(f"{name} must {must}, got {value}")


def _numbers(config: DictConfig, name: str) -> Iterator[float]:
    """The numbers of an option; none where it is None."""
    value = OmegaConf.select(config, name)
    if OmegaConf.is_list(value):
        check_filled(config, name)
        yield from value
    elif value is not None:
        yield value
