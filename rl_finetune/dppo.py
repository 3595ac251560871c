"""DPPO: Diffusion Policy Policy Optimization (Ren et al. 2024), on the one transition of the project.

Denoising is a decision process inside the task's: each of the last K' of K denoising steps is an action with a
Gaussian log-probability, and all of them share the advantage of the chunk that they lead to. With eta > 0 every
path has Gaussian steps, so diffusion (DDPM, DDIM) and flow policies are fine-tuned by the same lines.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, final

import torch
from torch import Tensor, nn

from flowsteer.policies.build import path_of
from flowsteer.policies.choices import pick
from flowsteer.policies.denoising import SOLVERS, DenoisingPolicy
from flowsteer.policies.networks.base import Features
from flowsteer.policies.networks.staged import StagedNetwork
from flowsteer.policies.policy import Observation, Policy
from flowsteer.policies.samplers import Gaussian, coefficients, randn, sample
from flowsteer.rl_finetune.algorithm import Algorithm, Explored, Memory, Step, check_options, denoising
from flowsteer.rl_finetune.errors import FinetuneError
from flowsteer.rl_finetune.exploration import Exploration
from flowsteer.rl_finetune.trust_region import REDUCTIONS, SURROGATES, clip_schedule, scale_of

FINE_TUNED = 10
"""Denoising steps that are tuned unless another number is given, of policies that have as many."""


@final
class DPPO(Algorithm):
    """PPO on the last K' denoising steps.

    Args:
        policy: a diffusion or flow policy; a copy of it stays as it is, where earlier steps or an anchor need one.
        exploration: builds the noise from K', To * F and Da.
        steps: K, denoising steps; the policy's own where not given.
        fine_tuned_steps: K', at most K; where not given 10, or K if that is fewer.
        eta: noise of the transitions, in [0, 1]; the tuned policy is judged and deployed with it too. With 0 there is
            only what `exploration` adds, and the judged policy is deterministic.
        clip_first: clip range of the ratio at the noisiest fine-tuned step.
        clip_last: at the last one; in between it grows exponentially.
        denoising_discount: of the advantage, per denoising step before the last.
        reduction: of the log-probability over the executed steps and action dimensions: "mean", "sum" or "sqrt". The
            clip ranges are for the one that is chosen: a mean over 16 numbers moves 16 times less than their sum.
        surrogate: "ppo" or "aspo".
        noise_limit: sampled noise is clamped to so many deviations.
        log_prob_floor: smallest deviation of log-probabilities, where it is above the one that was explored with.
        log_prob_limits: each element's log-probability is clamped to them; null for none.
        normalize_ratio: GRPO-Guard's ratio (arXiv 2510.22319), which takes out of the log-ratio its mean and the size
            of the step's noise.
        anchor: weight of KL(tuned || cloned) of each transition, which keeps the policy near its demonstrations.
        train_encoder: train the encoder of observations too; only with K' = K, since the cloned network keeps its own.

    Raises:
        FinetuneError: the policy has no `denoise`, or an option is out of its range.
    """

    def __init__(
        self,
        policy: Policy,
        exploration: Callable[[int, int, int], Exploration],
        steps: int | None = None,
        fine_tuned_steps: int | None = None,
        eta: float = 1.0,
        clip_first: float = 0.01,
        clip_last: float = 0.01,
        denoising_discount: float = 0.99,
        reduction: str = "mean",
        surrogate: str = "ppo",
        noise_limit: float = 3.0,
        log_prob_floor: float = 0.0,
        log_prob_limits: tuple[float, float] | None = None,
        normalize_ratio: bool = False,
        anchor: float = 0.0,
        train_encoder: bool = False,
    ) -> None:
        super().__init__(policy, train_encoder)
        tuned, spec = denoising(policy, "dppo"), policy.spec
        if steps is not None:
            tuned.set_steps(steps)
        self.steps, self.eta, self.anchor = len(tuned.grid) - 1, eta, anchor
        self.rows = min(FINE_TUNED, self.steps) if fine_tuned_steps is None else fine_tuned_steps
        self.first = self.steps - self.rows
        self.noise_limit, self.log_prob_floor, self.log_prob_limits = noise_limit, log_prob_floor, log_prob_limits
        self.normalize_ratio = normalize_ratio
        self._check(clip_first, clip_last, denoising_discount)
        self.cloned = copy.deepcopy(tuned).requires_grad_(False) if self.first or anchor else None
        self.exploration = exploration(self.rows, spec.observation_steps * policy.encoder.feature_dim, spec.action_dim)
        self.reduce, self.surrogate = pick(REDUCTIONS, reduction, "reduction"), pick(SURROGATES, surrogate, "surrogate")
        self.scale = scale_of(self.reduce, spec.execution_steps, spec.action_dim)
        # Options, not state: a resumed run may have others.
        self.register_buffer("clip", clip_schedule(clip_first, clip_last, self.rows), persistent=False)
        discount = denoising_discount ** torch.arange(self.rows - 1, -1, -1)
        self.register_buffer("discount", discount, persistent=False)
        grid = tuned.grid[self.first :]
        known = torch.stack(coefficients(tuned.path, grid[:-1], grid[1:], eta))
        self.register_buffer("coefficients", known[..., None, None], persistent=False)
        self.headline = (
            f"K = {self.steps}, K' = {self.rows}, eta = {eta:g}; the ratio of the {reduction} log-probability is "
            f"clipped to 1 +- {clip_first:g} (noisiest step) ... {clip_last:g} (last step), and train.target_kl is of "
            "it too"
        )

    def _check(self, clip_first: float, clip_last: float, denoising_discount: float) -> None:
        """Refuse options that are out of range, or do not go together."""
        steps, limits = f"from 1 to the {self.steps} denoising steps", self.log_prob_limits
        check_options(
            ("eta", 0 <= self.eta <= 1, "in [0, 1]", self.eta),
            ("fine_tuned_steps", 1 <= self.rows <= self.steps, steps, self.rows),
            ("clip_first", clip_first > 0, "positive", clip_first),
            ("clip_last", clip_last > 0, "positive", clip_last),
            ("denoising_discount", 0 < denoising_discount <= 1, "in (0, 1]", denoising_discount),
            ("noise_limit", self.noise_limit > 0, "positive", self.noise_limit),
            ("log_prob_floor", self.log_prob_floor >= 0, "not negative", self.log_prob_floor),
            ("anchor", self.anchor >= 0, "not negative", self.anchor),
        )
        if limits is not None and not (len(limits) == 2 and limits[0] < limits[1]):
            raise FinetuneError(f"algo.log_prob_limits must be [low, high], got {list(limits)}")
        if self.normalize_ratio and limits is not None:
            raise FinetuneError("algo.normalize_ratio takes whole log-probabilities: leave algo.log_prob_limits out")
        if self.train_encoder and (self.first or self.anchor):
            raise FinetuneError(
                f"algo.train_encoder=true needs algo.fine_tuned_steps={self.steps} and algo.anchor=0: "
                "the cloned network knows only the encoder that it was cloned with"
            )

    @property
    def tuned(self) -> DenoisingPolicy:
        """The policy, which denoises."""
        return denoising(self.policy, "dppo")

    @property
    def network(self) -> nn.Module:
        """The policy's."""
        return self.tuned.network

    @property
    def frozen(self) -> DenoisingPolicy:
        """The cloned policy, where it is needed."""
        assert self.cloned is not None
        return self.cloned

    clip: Tensor
    discount: Tensor
    coefficients: Tensor
    """c_a, c_x and std of the K' steps, [3, K', 1, 1]: see `samplers.coefficients`."""

    @torch.no_grad()
    def explore(self, obs: Observation, features: Tensor, generator: torch.Generator) -> Explored:
        """Run the chain; remembers x of the K' + 1 times, and mean and log-probability of the K' steps."""
        policy, spec = self.tuned, self.tuned.spec
        x = randn((len(features), spec.prediction_steps, spec.action_dim), generator, features.device)
        x = self._earlier_steps(x, generator, features)
        denoise = policy.denoise_on(policy.grid, policy.network.embed_observation(features))
        levels = self.exploration.levels(features, self.progress)[:, :, None]
        chain, means, log_probs = [x], [], []
        for i in range(self.rows):
            gaussian = self._transition(denoise(x, self.first + i), x, self.coefficients[:, i], levels[:, i])
            noise = randn(x.shape, generator, x.device).clamp(-self.noise_limit, self.noise_limit)
            x = gaussian.mean + gaussian.std * noise
            chain.append(x)
            means.append(gaussian.mean)
            log_probs.append(self._log_prob(gaussian, x))
        actions = policy.physical(x, obs)[:, spec.executed]
        memory = {"chain": torch.stack(chain, 1), "mean": torch.stack(means, 1), "log_prob": torch.stack(log_probs, 1)}
        return Explored(actions, memory)

    def step(self, features: Tensor, memory: Memory, decision: Tensor, row: Tensor, advantage: Tensor) -> Step:
        """PPO's surrogate of the transitions (decision, row)."""
        policy = self.tuned
        x_t, x_s = memory["chain"][decision, row], memory["chain"][decision, row + 1]
        cond = _take(policy.network.embed_observation(features), decision)
        a_hat = policy.denoise_on(policy.grid, cond)(x_t, self.first + row)
        levels = self.exploration.levels(features, self.progress)[decision, row][:, None]
        gaussian = self._transition(a_hat, x_t, self.coefficients[:, row], levels)
        log_ratio = self._log_prob(gaussian, x_s) - memory["log_prob"][decision, row]
        ratio = log_ratio
        if self.normalize_ratio:
            ratio = self._guarded(log_ratio, gaussian, memory["mean"][decision, row])
        clip = self.clip[row]
        loss = self.surrogate(ratio, advantage * self.discount[row], clip).mean()
        parts = {"noise_std": gaussian.std.mean().detach()}
        if self.anchor:
            parts["anchor"] = self._divergence(gaussian, features, decision, x_t, row)
            loss = loss + self.anchor * parts["anchor"]
        clipped = (ratio.detach().exp() - 1).abs() > clip
        return Step(loss, log_ratio.detach(), clipped, {k: v.detach() for k, v in parts.items()})

    def acting(self) -> Policy:
        """The cloned network for the first K - K' steps, the tuned one for the others."""
        acting = copy.copy(self.tuned)
        acting._modules = dict(self.tuned._modules)
        acting.eta, acting.solver = self.eta, SOLVERS["transition"]
        if self.first:
            acting.network = StagedNetwork.of(self.frozen.network, self.tuned.network, self._switch())
        return acting

    def describe(self, config: dict[str, Any]) -> dict[str, Any]:
        """See `Algorithm`."""
        described = {**config, "steps": self.steps, "eta": self.eta, "solver": "transition"}
        if self.first:
            described["network"] = {
                "_target_": path_of(StagedNetwork),
                "_partial_": True,
                "network": config["network"],
                "switch": self._switch(),
            }
        return described

    def _switch(self) -> float:
        """A time between the last step of the cloned network and the first of the tuned one."""
        return self.tuned.grid[self.first - 1 : self.first + 1].mean().item()

    def _earlier_steps(self, x: Tensor, generator: torch.Generator, features: Tensor) -> Tensor:
        """The first K - K' steps, of the cloned policy alone; the encoder is the same for both then."""
        if not self.first:
            return x
        policy, grid = self.frozen, self.tuned.grid[: self.first + 1]
        denoise = policy.denoise_on(grid, policy.network.embed_observation(features))
        return sample(policy.path, denoise, x, grid, self.eta, generator)

    def _transition(self, a_hat: Tensor, x: Tensor, known: Tensor, level: Tensor) -> Gaussian:
        """Fine-tuned steps from x [R, Tp, Da], with the noise to explore with [R, 1, Da or 1]."""
        c_a, c_x, std = known.unbind()
        return Gaussian(c_a * a_hat + c_x * x, self.exploration(std, level))

    def _log_prob(self, gaussian: Gaussian, x: Tensor) -> Tensor:
        """Of the steps that are executed, [R]."""
        each = self._floored(gaussian).log_prob(x)[:, self.tuned.spec.executed]
        return self.reduce(each if self.log_prob_limits is None else each.clamp(*self.log_prob_limits))

    def _floored(self, gaussian: Gaussian) -> Gaussian:
        """With the deviation of log-probabilities."""
        return Gaussian(gaussian.mean, gaussian.std.clamp(min=self.log_prob_floor))

    def _guarded(self, log_ratio: Tensor, new: Gaussian, old_mean: Tensor) -> Tensor:
        """(log r + |mu - mu_old|^2 / (2 std^2)) std: mean 0 under the old policy, alike for all noise levels.

        The weight 1 / (-dt) of its loss is the same for all steps of a grid of equal ones.
        """
        executed = self.tuned.spec.executed
        # A factor, not something to learn by: a learned deviation could make its own ratio.
        std = self._floored(new).std.detach().expand_as(new.mean)[:, executed]
        bias = ((new.mean - old_mean)[:, executed] / std).square() / 2
        return (log_ratio + self.reduce(bias)) * std.flatten(1).mean(1)

    def _divergence(self, new: Gaussian, features: Tensor, decision: Tensor, x: Tensor, row: Tensor) -> Tensor:
        """KL of transitions with the same deviation: |mu - mu_cloned|^2 / (2 std^2), mean over the elements."""
        with torch.no_grad():
            cond = _take(self.frozen.network.embed_observation(features), decision)
            a_hat = self.frozen.denoise_on(self.tuned.grid, cond)(x, self.first + row)
            c_a, c_x, _ = self.coefficients[:, row].unbind()
            old_mean = c_a * a_hat + c_x * x
        return ((new.mean - old_mean) / new.std.detach()).square().mean() / 2


def _take(features: Features, rows: Tensor) -> Features:
    # The backward pass of f[rows] takes three times as long.
    return tuple(feature.index_select(0, rows) for feature in features)
