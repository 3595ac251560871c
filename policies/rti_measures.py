"""What real-time iteration is chosen by, besides the task's score: decisions to try it on, and its contraction."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, final

import torch
from torch import Tensor

from flowsteer.policies.policy import Observation, Policy
from flowsteer.policies.rti import RealTimeIteration, RtiOptions, denoising, observed_numbers

USUAL = 0.99
"""Of the changes between decisions that were seen: what is larger is not usual, an angle that wraps around, say."""


class Situations(NamedTuple):
    """Where a policy decided: what it observed {key: [N, To, ...]}, its last chunks before [N, Tp, Da] in physical
    units, and the control steps since these [N]."""

    obs: dict[str, Tensor]
    previous: Tensor
    executed: Tensor


@final
class Recorder:
    """Decides as the policy itself does, and keeps one situation of every batch.

    Args:
        policy: one that denoises.
    """

    def __init__(self, policy: Policy) -> None:
        grid = denoising(policy).grid
        every_time = RtiOptions(grid[0].item(), len(grid) - 1, refresh_every=1, binarise=False)
        self._rti = RealTimeIteration(policy, every_time)
        self._kept: list[Situations] = []
        self._changes: list[Tensor] = []

    def decide(
        self, obs: Observation, *, executed: Tensor, rows: Tensor, generator: Sequence[torch.Generator]
    ) -> Tensor:
        """See `RealTimeIteration.decide`."""
        last = self._rti.last(rows)
        going = (last.known & (executed > 0)).nonzero().flatten()
        if len(going):
            change = (observed_numbers(self._rti.policy, obs) - last.seen)[going]
            self._changes.append(change.abs().amax(dim=1) if change.shape[1] else change.new_zeros(len(change)))
            # Another row each time, so that all of them are seen at all stages of their episodes.
            one = going[[len(self._kept) % len(going)]]
            some = {key: value[one.to(value.device)] for key, value in obs.items()}
            self._kept.append(Situations(some, last.chunks[one], executed[one]))
        return self._rti.decide(obs, executed=executed, rows=rows, generator=generator)

    def usual_change(self) -> float:
        """What an observed number mostly changes by less than from one decision to the next, in normalised units."""
        return torch.cat(self._changes).quantile(USUAL).item() if self._changes else 0.0

    def situations(self) -> Situations | None:
        """Those kept, in order; None where no episode had a second decision."""
        if not self._kept:
            return None
        obs, previous, executed = zip(*self._kept, strict=True)
        together = {key: torch.cat([one[key] for one in obs]) for key in obs[0]}
        return Situations(together, torch.cat(previous), torch.cat(executed))


@torch.no_grad()
def contraction(rti: RealTimeIteration, situations: Situations, size: float = 0.05) -> Tensor:
    """How much of an error of the guess is left in the chunk, [N]: above 1 errors grow from decision to decision.

    |chunk(guess + e) - chunk(guess)| / |e| for one e ~ N(0, size^2), in network units, at the same noise. Measured,
    since the bound of RTI-DP (theorem 1, as printed) is never below 1.
    """
    guess = rti.guess(*situations)
    error = size * torch.randn(guess.shape, generator=torch.Generator().manual_seed(0)).to(guess.device)
    without, with_error = (
        rti.refine(situations.obs, start, generator=torch.Generator().manual_seed(1))
        for start in (guess, guess + error)
    )
    left, put_in = (x.flatten(1).square().sum(dim=1) for x in (with_error - without, error))
    return (left / put_in).sqrt()
