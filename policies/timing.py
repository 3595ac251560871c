"""How long something takes on a device that works on while Python goes ahead."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

import torch

T = TypeVar("T")


def synchronize(device: torch.device) -> None:
    """Wait for all streams of a GPU; a CPU has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(call: Callable[[], T], device: torch.device) -> tuple[T, float]:
    """What `call` returns, and the seconds until `device` has done it."""
    synchronize(device)
    started = time.perf_counter()
    result = call()
    synchronize(device)
    return result, time.perf_counter() - started


def fastest_s(call: Callable[[], object], device: torch.device, repeats: int) -> float:
    """The least seconds that `call` takes: whatever disturbs a measurement makes it longer."""
    return min(timed(call, device)[1] for _ in range(repeats))
