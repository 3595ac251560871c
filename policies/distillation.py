"""What a consistency policy learns from its teacher, as a loss that the loop of behaviour cloning descends.

B batch, Tp predicted steps, Da action width. Teacher phi, student theta, averaged student theta-; the grid is the
teacher's together with the student's own times t_0 > t_1 > ... > 0.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn import functional

from flowsteer.policies.consistency import ConsistencyPolicy
from flowsteer.policies.denoising import DenoisingPolicy
from flowsteer.policies.errors import PolicyError
from flowsteer.policies.paths import expand
from flowsteer.policies.policy import ACTION, Draws, Loss
from flowsteer.policies.samplers import sample, transition
from flowsteer.policies.spec import configurable


@final
@configurable
class Distillation(nn.Module):
    """Weighted sum of two losses, each a mean square over normalised chunks.

    Args:
        student: theta, learns.
        target: theta-, its average.
        teacher: phi, deterministic; its encoder and normaliser are the student's.
        same_noise: weight of regression (RL-100, arXiv 2510.14830): the student's chunk of a noise against the
            teacher's of the same noise. One evaluation for each of the teacher's steps.
        consistency: weight of the consistency loss (latent consistency models, Luo et al. 2023): from a noisy
            demonstration, the student must land where its average does one step of the teacher later. One evaluation of
            the teacher; trains `denoise` at all times of the grid.

    Raises:
        PolicyError: a weight is negative or not finite, or both are 0.
    """

    def __init__(
        self,
        student: ConsistencyPolicy,
        target: ConsistencyPolicy,
        teacher: DenoisingPolicy,
        same_noise: float = 1.0,
        consistency: float = 0.0,
    ) -> None:
        super().__init__()
        weights = {"same_noise": same_noise, "consistency": consistency}
        for name, weight in weights.items():
            if not 0 <= weight < math.inf:
                raise PolicyError(f"loss.{name} must be finite and not negative, got {weight:g}")
        if not any(weights.values()):
            raise PolicyError("loss.same_noise and loss.consistency are both 0: there is nothing to learn")
        self.weights = {name: weight for name, weight in weights.items() if weight}
        # No gradient passes where a chunk is clipped, so the student learns without.
        self.student = copy.copy(student)
        self.student.clip = None
        self.target, self.teacher = target, teacher
        own = student.grid.tolist()
        times = sorted({*teacher.grid.tolist(), *own}, reverse=True)
        landings = [max(s for s in own if s < t) for t in times[:-1]]
        self.register_buffer("grid", torch.tensor(times), persistent=False)
        self.register_buffer("landings", torch.tensor(landings), persistent=False)
        self.to(student.grid.device)

    grid: Tensor
    landings: Tensor

    def draw(self, batch_size: int, generator: torch.Generator | None = None) -> Draws:
        """Steps of the grid [B], all of them about equally often, and noise [B, Tp, Da]."""
        steps, spec = len(self.landings), self.student.spec
        shift = torch.randint(steps, (1,), generator=generator)
        k = (shift + torch.arange(batch_size) * steps // batch_size) % steps
        return k, torch.randn(batch_size, spec.prediction_steps, spec.action_dim, generator=generator)

    def loss(self, batch: Mapping[str, Any], draws: Draws | None = None) -> Loss:
        """Of a batch {"obs": {key: [B, To, ...]}, "action": [B, Tp, Da]} in physical units."""
        student, obs = self.student, batch["obs"]
        a = student.normalizer.normalize(ACTION, student.relative(batch[ACTION], obs))
        k, eps = (draw.to(a.device) for draw in (self.draw(len(a)) if draws is None else draws))
        with torch.no_grad():
            # The student's: while it learns, an encoder may disturb what it sees.
            features = student.features(obs)
        losses = {"same_noise": self._same_noise, "consistency": self._consistency}
        parts = {name: losses[name](features, a, k, eps) for name in self.weights}
        total = torch.stack([self.weights[name] * part for name, part in parts.items()]).sum()
        return Loss(total, {name: part.detach() for name, part in parts.items()})

    forward = loss

    def _same_noise(self, features: Tensor, a: Tensor, k: Tensor, eps: Tensor) -> Tensor:
        """| x_0^theta(eps) - x_0^phi(eps) |^2, through all N steps of the student."""
        teacher, student = self.teacher, self.student
        with torch.no_grad():
            denoise = teacher.denoise_on(teacher.grid, teacher.network.embed_observation(features))
            wanted = teacher.solver(teacher.path, denoise, eps, teacher.grid, 0.0, None)
        denoise = student.denoise_on(student.grid, student.network.embed_observation(features))
        return functional.mse_loss(sample(student.path, denoise, eps, student.grid, 0.0), wanted)

    def _consistency(self, features: Tensor, a: Tensor, k: Tensor, eps: Tensor) -> Tensor:
        """| G_theta(x_t, t, s) - G_theta-(x_u^phi, u, s) |^2, t > u >= s neighbours of the grid, s a landing."""
        teacher = self.teacher
        t, u, s = self.grid[k], self.grid[k + 1], self.landings[k]
        x_t = teacher.path.noisy(a, eps, t)
        with torch.no_grad():
            a_hat = teacher.denoise_on(self.grid, teacher.network.embed_observation(features))(x_t, k)
            x_u = transition(teacher.path, x_t, a_hat, t, u, 0.0).mean
            # A landing leads nowhere; at t = 0 the transition from it is 0 / 0.
            arrived = expand(u == s, x_u)
            reference = torch.where(arrived, x_u, self._land(self.target, features, x_u, u, s))
        return functional.mse_loss(self._land(self.student, features, x_t, t, s), reference)

    def _land(self, policy: ConsistencyPolicy, features: Tensor, x_t: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """G(x_t, t, s)."""
        g = policy.denoise(x_t, t, policy.network.embed_observation(features))
        return transition(policy.path, x_t, g, t, s, 0.0).mean
