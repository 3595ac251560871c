"""What several processes that train one policy tell each other; alone, nothing is sent."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import torch
from accelerate import Accelerator
from torch import Tensor, nn


@final
class Processes:
    """Sums and means over the processes of an accelerator.

    Args:
        accelerator: devices and processes.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self.count, self.rank, self.device = accelerator.num_processes, accelerator.process_index, accelerator.device

    def sum(self, values: Tensor) -> Tensor:
        """Elementwise over the processes."""
        return values if self.count == 1 else self._accelerator.reduce(values, "sum")

    def total(self, value: float) -> float:
        """The sum of one number of each process."""
        return float(self.sum(torch.tensor(value, dtype=torch.float64, device=self.device)).item())

    def largest(self, value: int) -> int:
        """Of one number of each process."""
        mine = torch.tensor([[value]], device=self.device)
        return int(self.gather(mine).max().item())

    def gather(self, values: Tensor) -> Tensor:
        """Arrays [S, N] of all processes side by side."""
        return values if self.count == 1 else self._accelerator.gather(values.T.contiguous()).T

    def moments(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of all values [D] of all processes."""
        count = torch.tensor(float(len(values)), device=self.device)
        total, number = self.sum(torch.stack([values.sum(), count]))
        mean = total / number
        return mean, (self.sum((values - mean).square().sum()) / number).sqrt()

    def average_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Give every process the mean of the gradients."""
        if self.count == 1:
            return
        gradients = [p.grad for p in parameters if p.grad is not None]
        flat = self._accelerator.reduce(torch.cat([g.flatten() for g in gradients]), "mean")
        for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))
