"""The check that every back end makes of the actions it is given."""

from __future__ import annotations

from typing import NamedTuple, final

import torch
from torch import Tensor

from flowsteer.sim.complaints import WarnOnce
from flowsteer.sim.errors import SimError
from flowsteer.sim.spec import TaskSpec


class Checked(NamedTuple):
    """Actions [B, Ta, Da] within the limits, zero where they were not finite; `broken` [B] bool: the running
    environments whose episode they cost; `hopeless` [] bool: that is all that run."""

    chunks: Tensor
    broken: Tensor
    hopeless: Tensor


@final
class ActionCheck:
    """Checks actions for B environments of `spec` on `device`, without waiting for it."""

    def __init__(self, spec: TaskSpec, num_envs: int, device: torch.device) -> None:
        self._spec, self._num_envs, self._device = spec, num_envs, device
        self._tell = WarnOnce()
        self._low = torch.tensor(spec.action_low, device=device)
        self._high = torch.tensor(spec.action_high, device=device)

    def __call__(self, actions: Tensor, running: Tensor) -> Checked:
        """Check the actions of all environments, of which those of the mask [B] run.

        Raises:
            SimError: wrong shape.
        """
        wanted = (self._num_envs, actions.shape[1] if actions.ndim == 3 else 0, self._spec.action_dim)
        if actions.shape != wanted or actions.shape[1] < 1:
            raise SimError(
                f"{self._spec.name}: actions must be [{self._num_envs}, Ta, {self._spec.action_dim}], "
                f"got {list(actions.shape)}"
            )
        actions = actions.detach().to(self._device, torch.float32)
        finite = actions.isfinite().all(dim=2).all(dim=1)
        broken = running & ~finite
        chunks = torch.where(finite[:, None, None], actions, 0.0).clip(self._low, self._high)
        hopeless = broken.any() & (broken == running).all()
        if self._device.type == "cpu":
            self.warn(bool(broken.any() & ~hopeless))
        return Checked(chunks, broken, hopeless)

    def warn(self, broken: bool) -> None:
        """Say once that `broken`, any of `Checked.broken`, costs episodes; on a CPU, the check itself does."""
        if broken:
            name = self._spec.name
            self._tell([f"{name}: some actions were not finite; the episodes that met them are lost: mend the policy"])

    def refuse(self, hopeless: bool) -> None:
        """End the run of a policy that has diverged; reading `Checked.hopeless` waits for the device.

        Raises:
            SimError: `hopeless`.
        """
        if hopeless:
            raise SimError(
                f"{self._spec.name}: no environment got finite actions; "
                "the policy has diverged or its normaliser is broken"
            )
