"""PPO (Schulman et al. 2017) on a Gaussian policy: the baseline."""

from __future__ import annotations

from typing import Any, final

import torch
from torch import Tensor, nn

from flowsteer.policies.choices import pick
from flowsteer.policies.denoising import DenoisingPolicy
from flowsteer.policies.gaussian import GaussianPolicy
from flowsteer.policies.policy import Observation, Policy
from flowsteer.policies.samplers import Gaussian, randn
from flowsteer.rl_finetune.algorithm import Algorithm, Explored, Memory, Step, check_options
from flowsteer.rl_finetune.errors import FinetuneError
from flowsteer.rl_finetune.trust_region import REDUCTIONS, SURROGATES, scale_of


@final
class GaussianPPO(Algorithm):
    """PPO on chunks; the policy's own standard deviation explores and is left out when it is judged.

    Args:
        policy: a Gaussian policy.
        clip: clip range of the ratio.
        surrogate: "ppo" or "aspo".
        reduction: of the log-probability over the executed steps and action dimensions: "mean", "sum" or "sqrt".
        entropy: weight of the policy's entropy, mean over the action dimensions.
        train_encoder: train the encoder of observations too.

    Raises:
        FinetuneError: the policy is of another family.
    """

    def __init__(
        self,
        policy: Policy,
        clip: float = 0.2,
        surrogate: str = "ppo",
        reduction: str = "sum",
        entropy: float = 0.0,
        train_encoder: bool = False,
    ) -> None:
        super().__init__(policy, train_encoder)
        if not isinstance(policy, GaussianPolicy):
            denoises = isinstance(policy, DenoisingPolicy)
            remedy = "algo=dppo and algo=fpo take it" if denoises else "no algorithm here takes it"
            raise FinetuneError(
                f"algo=ppo needs policy=gaussian, this is of the class {type(policy).__name__}; {remedy}"
            )
        check_options(("clip", clip > 0, "positive", clip))
        self.clip, self.entropy = clip, entropy
        self.surrogate, self.reduce = pick(SURROGATES, surrogate, "surrogate"), pick(REDUCTIONS, reduction, "reduction")
        self.scale = scale_of(self.reduce, policy.spec.execution_steps, policy.spec.action_dim)
        ratio = f"the ratio of the {reduction} log-probability"
        self.headline = f"{ratio} is clipped to 1 +- {clip:g}, and train.target_kl is of it too"

    @property
    def tuned(self) -> GaussianPolicy:
        """The policy, which is a Gaussian."""
        assert isinstance(self.policy, GaussianPolicy)
        return self.policy

    @property
    def network(self) -> nn.Module:
        """Of the mean."""
        return self.tuned.mean

    @torch.no_grad()
    def explore(self, obs: Observation, features: Tensor, generator: torch.Generator) -> Explored:
        """Sample; remembers the chunk and its log-probability."""
        policy = self.tuned
        gaussian = policy.distribution(features)
        a = gaussian.mean + gaussian.std * randn(gaussian.mean.shape, generator, gaussian.mean.device)
        actions = policy.physical(a, obs)[:, policy.spec.executed]
        return Explored(actions, {"chunk": a, "log_prob": self._log_prob(gaussian, a)})

    def step(self, features: Tensor, memory: Memory, decision: Tensor, row: Tensor, advantage: Tensor) -> Step:
        """PPO's surrogate of whole chunks."""
        gaussian = self.tuned.distribution(features[decision])
        log_ratio = self._log_prob(gaussian, memory["chunk"][decision]) - memory["log_prob"][decision]
        clip = torch.tensor(self.clip, device=log_ratio.device)
        entropy = gaussian.std.log().mean()
        loss = self.surrogate(log_ratio, advantage, clip).mean() - self.entropy * entropy
        detached = log_ratio.detach()
        parts = {"noise_std": gaussian.std.mean().detach()}
        return Step(loss, detached, (detached.exp() - 1).abs() > clip, parts)

    def acting(self) -> Policy:
        """The policy itself, which acts with its mean."""
        return self.tuned

    def describe(self, config: dict[str, Any]) -> dict[str, Any]:
        """As it was."""
        return config

    def _log_prob(self, gaussian: Gaussian, a: Tensor) -> Tensor:
        return self.reduce(gaussian.log_prob(a)[:, self.tuned.spec.executed])
