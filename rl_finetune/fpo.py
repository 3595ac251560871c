"""FPO: flow policy optimisation (McAllister et al. 2025), and its successor FPO++ (arXiv 2602.02481).

The likelihood ratio of PPO is replaced by one of denoising losses: with the same times and noise under old and new
weights, exp(L_old - L_new) is a surrogate for how much more likely the chunk has become. The sampler may be anything.
"""

from __future__ import annotations

from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn import functional

from flowsteer.policies.choices import pick
from flowsteer.policies.consistency import ConsistencyPolicy
from flowsteer.policies.denoising import DenoisingPolicy
from flowsteer.policies.networks.base import Features
from flowsteer.policies.paths import expand
from flowsteer.policies.policy import Observation, Policy
from flowsteer.policies.samplers import randn
from flowsteer.rl_finetune.algorithm import Algorithm, Explored, Memory, Step, check_options, denoising
from flowsteer.rl_finetune.errors import FinetuneError
from flowsteer.rl_finetune.trust_region import REDUCTIONS, SURROGATES, clamp_through, scale_of

UNTRAINED: dict[str, float] = {"perturbation": 0.3}
"""What suits a policy that has learnt nothing: as much noise as a Gaussian one has."""


@final
class FPO(Algorithm):
    """PPO with a ratio of denoising losses.

    Args:
        policy: a diffusion or flow policy.
        pairs: N, (time, noise) pairs that are drawn for a chunk when it is sampled, and kept for all epochs.
        per_pair: one ratio for each pair (FPO++), or one of the mean loss (FPO).
        clip: clip range of the ratio.
        surrogate: "aspo", or "ppo" as in the first paper, which pulls nothing back that has left the trust region.
        reduction: of the loss over the steps and action dimensions: "mean", "sqrt" or "sum".
        whole_chunk: count the predicted steps that are not executed as well.
        as_eps: measure the error of the noise rather than that of what the network predicts. From nothing it learns
            faster; on the linear path it weighs time t by (1 - t)^2, so that a cloned policy drifts where t is near 1.
        huber: where the loss turns from square to linear; null for the square.
        loss_limit: a pair's mean error is clamped to it, whatever the reduction; gradients pass through.
        ratio_limit: so is the log-ratio, to +-ratio_limit.
        perturbation: noise added to sampled chunks, in normalised units, beside the sampler's own, whose spread is
            soon gone. Where not given 0.1, which suits a cloned policy; `flowsteer finetune` takes `UNTRAINED`'s from
            nothing.
        train_encoder: train the encoder of observations too.

    Raises:
        FinetuneError: the policy has no denoising loss, or an option is out of its range.
    """

    def __init__(
        self,
        policy: Policy,
        pairs: int = 8,
        per_pair: bool = False,
        clip: float = 0.05,
        surrogate: str = "aspo",
        reduction: str = "mean",
        whole_chunk: bool = False,
        as_eps: bool = False,
        huber: float | None = None,
        loss_limit: float = 20.0,
        ratio_limit: float = 3.0,
        perturbation: float | None = None,
        train_encoder: bool = False,
    ) -> None:
        super().__init__(policy, train_encoder)
        if isinstance(policy, ConsistencyPolicy):
            raise FinetuneError(
                "algo=fpo needs a denoising loss, which a ConsistencyPolicy has not: "
                "fine-tune its teacher, or it with algo=dppo"
            )
        denoising(policy, "fpo")
        check_options(
            ("pairs", pairs >= 1, "at least 1", pairs),
            ("clip", clip > 0, "positive", clip),
            ("huber", huber is None or huber > 0, "positive or null", huber or 0),
            ("loss_limit", loss_limit > 0, "positive", loss_limit),
            ("ratio_limit", ratio_limit > 0, "positive", ratio_limit),
            ("perturbation", (perturbation or 0) >= 0, "not negative", perturbation or 0),
        )
        self.pairs, self.per_pair, self.clip = pairs, per_pair, clip
        self.surrogate, self.reduce = pick(SURROGATES, surrogate, "surrogate"), pick(REDUCTIONS, reduction, "reduction")
        self.counted = slice(None) if whole_chunk else policy.spec.executed
        steps = policy.spec.prediction_steps if whole_chunk else policy.spec.execution_steps
        self.scale = scale_of(self.reduce, steps, policy.spec.action_dim)
        self.as_eps, self.huber = as_eps, huber
        self.loss_limit, self.ratio_limit = loss_limit, ratio_limit
        self.perturbation = 0.1 if perturbation is None else perturbation
        whose = "each pair's" if per_pair else "the pairs' mean"
        self.headline = (
            f"N = {pairs}; the ratio is of {whose} denoising loss ({reduction} over a chunk's elements), clipped to "
            f"1 +- {clip:g} ({surrogate}), and train.target_kl is of it too"
        )

    @property
    def tuned(self) -> DenoisingPolicy:
        """The policy, which denoises."""
        return denoising(self.policy, "fpo")

    @property
    def network(self) -> nn.Module:
        """The policy's."""
        return self.tuned.network

    @torch.no_grad()
    def explore(self, obs: Observation, features: Tensor, generator: torch.Generator) -> Explored:
        """Sample as the policy does; remembers the chunk, the N pairs and their losses."""
        policy = self.tuned
        cond = policy.network.embed_observation(features)
        noise = randn((len(features), policy.spec.prediction_steps, policy.spec.action_dim), generator, features.device)
        denoise = policy.denoise_on(policy.grid, cond)
        a = policy.solver(policy.path, denoise, noise, policy.grid, policy.eta, generator)
        if self.perturbation:
            a = a + self.perturbation * randn(a.shape, generator, a.device)
        # Pair n of all B chunks is one stretch of the draw: so the N times of a chunk cover the path evenly.
        drawn = policy.draw(self.pairs * len(a), generator)
        t, eps = (part.reshape(self.pairs, len(a), *part.shape[1:]).transpose(0, 1) for part in drawn)
        memory = {"chunk": a, "time": t.to(a.device), "noise": eps.to(a.device)}
        memory["loss"] = self._losses(cond, memory, torch.arange(len(a), device=a.device))
        return Explored(policy.physical(a, obs)[:, policy.spec.executed], memory)

    def step(self, features: Tensor, memory: Memory, decision: Tensor, row: Tensor, advantage: Tensor) -> Step:
        """PPO's surrogate with log r = L_old - L_new."""
        losses = self._losses(self.tuned.network.embed_observation(features), memory, decision)
        gain = memory["loss"][decision] - losses
        if not self.per_pair:
            gain = gain.mean(dim=1, keepdim=True)
        log_ratio = clamp_through(gain, -self.ratio_limit, self.ratio_limit)
        clip = torch.tensor(self.clip, device=log_ratio.device)
        loss = self.surrogate(log_ratio, advantage[:, None], clip).mean()
        detached = log_ratio.detach().flatten()
        noise = torch.tensor(self.perturbation, device=log_ratio.device)
        parts = {"denoising_loss": losses.mean().detach(), "noise_std": noise}
        return Step(loss, detached, (detached.exp() - 1).abs() > self.clip, parts)

    def acting(self) -> Policy:
        """The policy itself."""
        return self.tuned

    def describe(self, config: dict[str, Any]) -> dict[str, Any]:
        """As it was."""
        return config

    def _losses(self, cond: Features, memory: Memory, decision: Tensor) -> Tensor:
        """Denoising losses [R, N] of some chunks, each with its own pairs."""
        policy, n = self.tuned, self.pairs
        a = memory["chunk"][decision].repeat_interleave(n, dim=0)
        t, eps = memory["time"][decision].flatten(0, 1), memory["noise"][decision].flatten(0, 1)
        repeated = tuple(feature.index_select(0, decision.repeat_interleave(n)) for feature in cond)
        error = policy.denoising_error(a, repeated, t, eps)
        if self.as_eps:
            error = self._error_of_eps(error, t)
        error = error[:, self.counted]
        if self.huber is None:
            loss = error.square()
        else:
            loss = functional.huber_loss(error, torch.zeros_like(error), reduction="none", delta=self.huber)
        return clamp_through(self.reduce(loss), 0.0, self.loss_limit * self.scale).reshape(-1, n)

    def _error_of_eps(self, error: Tensor, t: Tensor) -> Tensor:
        """What an error of the prediction makes of eps_hat = (x - alpha a_hat) / sigma; `to_clean` is linear."""
        path = self.tuned.path
        clean = self.tuned.to_clean(path, torch.zeros_like(error), error, t)
        return -expand(path.alpha(t) / path.sigma(t), error) * clean
