"""The state of AdamW by parameter name, as tensors that a checkpoint can hold."""

from __future__ import annotations

import torch
from torch import Tensor, nn

SLOTS = ("step", "exp_avg", "exp_avg_sq")


def pack_optimizer(optimizer: torch.optim.Optimizer, module: nn.Module) -> dict[str, Tensor]:
    """{"SLOT.PARAMETER": value}; empty before the first step."""
    return {
        f"{slot}.{name}": value
        for name, parameter in module.named_parameters()
        for slot, value in optimizer.state.get(parameter, {}).items()
    }


def unpack_optimizer(optimizer: torch.optim.Optimizer, module: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Inverse of `pack_optimizer`.

    Raises:
        KeyError: part of a parameter's state is missing.
    """
    for name, parameter in module.named_parameters():
        if parameter.requires_grad and f"{SLOTS[0]}.{name}" in tensors:
            # Fused AdamW counts its steps on the parameter's device.
            optimizer.state[parameter] = {slot: tensors[f"{slot}.{name}"].to(parameter.device) for slot in SLOTS}
