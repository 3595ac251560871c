"""Where a policy runs, and which processes share the work."""

from __future__ import annotations

import os
from datetime import timedelta

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs

from flowsteer.cli.errors import UsageError, unknown

CHOICES = ("auto", "cpu")
LAUNCHED = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""What torchrun and `accelerate launch` tell each process, beside WORLD_SIZE."""
PATIENCE = timedelta(hours=6)
"""How long processes wait for the one that evaluates in simulation."""


def find_device(name: str) -> torch.device:
    """The device of "auto" (a GPU where there is one; CUDA_VISIBLE_DEVICES says which) or "cpu".

    Raises:
        UsageError: another name.
    """
    if name not in CHOICES:
        raise unknown("device", name, CHOICES)
    return torch.device("cuda" if name == "auto" and torch.cuda.is_available() else "cpu")


def find_processes(name: str) -> Accelerator:
    """The processes that torchrun or `accelerate launch` started, or this one alone.

    Raises:
        UsageError: an unknown device, or a launcher whose processes do not know of each other.
    """
    missing = [variable for variable in LAUNCHED if variable not in os.environ]
    if missing and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError(
            f"{os.environ['WORLD_SIZE']} processes were started that do not know of each other "
            f"({missing[0]} is not set): start them with torchrun or accelerate launch"
        )
    # Precision is the loop's own business: accelerate's fp16 would scale gradients that nobody scales back.
    return Accelerator(
        cpu=find_device(name).type == "cpu",
        mixed_precision="no",
        kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
    )
