"""What an iteration learns: advantages, then epochs of minibatches for the policy and for its critic."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, final

import torch
from torch import Tensor, nn
from torch.nn import functional

from flowsteer.rl_finetune.advantage import RewardScale, gae
from flowsteer.rl_finetune.algorithm import Algorithm, Memory, Step
from flowsteer.rl_finetune.critic import Critic
from flowsteer.rl_finetune.errors import FinetuneError
from flowsteer.rl_finetune.on_policy_config import OnPolicyConfig
from flowsteer.rl_finetune.processes import Processes
from flowsteer.rl_finetune.rollout import Rollout
from flowsteer.rl_finetune.trust_region import kl_estimate
from flowsteer.sim.vec_env import Observation

SAME_POLICY = 1e-4
"""Largest |log ratio| before anything has been learnt: more, and the update is not of the policy that collected."""
MICRO_BATCH, MICRO_BATCH_ON_GPU = 1250, 20_000
"""Rows at a time. On a CPU what they leave behind stays in the caches, and in memory that is used again."""
LOOKED_AT = 1000
"""Rows that tell how far the last step has moved the policy."""


@final
class Sample(NamedTuple):
    """An iteration, ready to learn from: D = S * N decisions, number d being of environment d % N.

    obs: {key: [D, To, ...]}; features: the same, encoded [D, To, F].
    memory: the algorithm's, [D, ...].
    advantage, target: [D]; normalised, and what the critic is to say.
    kept: the numbers of the decisions that count.
    """

    obs: Observation
    features: Tensor
    memory: Memory
    advantage: Tensor
    target: Tensor
    kept: Tensor


@final
class Update:
    """The optimisers and what they do with an iteration.

    Args:
        algorithm: with the policy that learns.
        critic: of its encoded observations.
        config: hyper-parameters.
        processes: that learn together.
        decisions: of an iteration in all processes, which says how many minibatches there are.
        generator: shuffles.
    """

    def __init__(
        self,
        algorithm: Algorithm,
        critic: Critic,
        config: OnPolicyConfig,
        processes: Processes,
        decisions: int,
        generator: torch.Generator,
    ) -> None:
        self.algorithm, self.critic, self.config, self.processes = algorithm, critic, config, processes
        self.decisions, self.generator = decisions, generator
        self.learning = [p for p in algorithm.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.learning, lr=config.lr, weight_decay=0.0, fused=True)
        self.critic_learning = list(critic.parameters())
        self.critic_optimizer = torch.optim.AdamW(
            self.critic_learning, lr=config.critic_lr, weight_decay=0.0, fused=True
        )
        usual = MICRO_BATCH if processes.device.type == "cpu" else MICRO_BATCH_ON_GPU
        self.micro_batch_size = config.micro_batch_size or usual
        self.reward_scale = RewardScale(config.gamma)
        self.gradient_steps = 0

    def __call__(self, rollout: Rollout, critic_alone: bool) -> dict[str, float]:
        """Learn from an iteration; numbers for the log.

        Raises:
            FinetuneError: the policy is not the one that collected, has moved too far, or is not finite any more.
        """
        sample, numbers = self.sample(rollout)
        if not critic_alone:
            numbers |= self._check_first(sample, rollout.reward.shape[1])
            numbers |= self._update_policy(sample)
        numbers["train/value_loss"] = self._update_critic(sample)
        self._check_finite()
        return numbers

    @torch.no_grad()
    def sample(self, rollout: Rollout) -> tuple[Sample, dict[str, float]]:
        """Advantages and targets of an iteration, and what they say of it.

        Raises:
            FinetuneError: no decision is kept.
        """
        config, reward = self.config, rollout.reward
        if not bool(rollout.kept.any()):
            raise FinetuneError(
                "the simulator lost the episode of every decision of an iteration, so there is nothing to learn from: "
                "the warnings above say why; the last checkpoint is kept"
            )
        features, final = self._encode(rollout.obs), self._encode(rollout.final_obs)
        value, next_value = (self.critic(part.flatten(0, 1)).view_as(reward) for part in (features, final))
        if config.scale_rewards:
            known = torch.where(rollout.kept, reward, 0.0)
            self.reward_scale.update(self.processes.gather(known), self.processes.gather(rollout.ended))
            reward = self.reward_scale(reward)
        ends = (rollout.terminated, rollout.ended, rollout.kept)
        advantage = gae(reward, value, next_value, *ends, config.gamma, config.lam)
        target, kept = (advantage + value).flatten(), rollout.kept.flatten()
        unexplained = advantage.flatten()[kept].var() / target[kept].var().clamp(min=1e-12)
        mean, std = self.processes.moments(advantage.flatten()[kept])
        normalized = (advantage.flatten() - mean) / (std + 1e-8)
        obs = {key: array.flatten(0, 1) for key, array in rollout.obs.items()}
        numbers = {
            "train/explained_variance": 1 - unexplained.item(),
            "train/advantage_std": std.item(),
            "train/reward_std": self.reward_scale.std,
            "collect/lost": float((~kept).sum()),
        }
        numbered = kept.nonzero()[:, 0]
        return Sample(obs, features.flatten(0, 1), rollout.flat_memory, normalized, target, numbered), numbers

    def _update_policy(self, sample: Sample) -> dict[str, float]:
        """Epochs over shuffled rows, until the policy has moved as far as it may."""
        rows, steps, taken = self.algorithm.rows, [], []
        kl = 0.0
        for batch in self._minibatches(len(sample.kept), rows, self.config.batch_size):
            # A decision's rows side by side: it is encoded in one part of the minibatch, not in several.
            batch = batch.sort().values
            step = self._accumulate(sample, batch)
            # Of the steps taken so far, on rows that are as good as new; augmentation is no step.
            kl = self._kl(self._look(sample, batch) if self.algorithm.train_encoder else step.log_ratio)
            if kl > self.config.target_kl:
                break
            self._descend(self.optimizer, self.learning)
            self.gradient_steps += 1
            steps.append(step)
            taken.append(batch % rows)
        else:
            kl = self._kl(self._look(sample, batch))
        numbers = _numbers(steps, torch.cat(taken), rows) if steps else {}
        return {"train/kl": kl, "train/minibatches": float(len(steps)), **numbers}

    def _descend(self, optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter]) -> None:
        """One step along the gradients that are there."""
        self.processes.average_gradients(parameters)
        nn.utils.clip_grad_norm_(parameters, self.config.grad_clip)
        optimizer.step()

    def _accumulate(self, sample: Sample, batch: Tensor) -> Step:
        """The gradients of a minibatch, one part after the other, so that its size costs no memory."""
        self.optimizer.zero_grad(set_to_none=True)
        encoder, steps = self.algorithm.policy.encoder, []
        # In training mode it augments, which is for minibatches alone.
        encoder.train(self.algorithm.train_encoder)
        try:
            for part in torch.split(batch, self.micro_batch_size):
                step, share = self.step(sample, part), len(part) / len(batch)
                (share * step.loss).backward()  # type: ignore[no-untyped-call]
                steps.append(step.scaled(share))
        finally:
            encoder.eval()
        return Step.sum(steps)

    def step(self, sample: Sample, batch: Tensor) -> Step:
        """The algorithm's step for rows numbered decision by decision; each decision is encoded once."""
        decision, row = sample.kept[batch // self.algorithm.rows], batch % self.algorithm.rows
        unique, inverse = torch.unique(decision, return_inverse=True)
        memory = {name: value[unique] for name, value in sample.memory.items()}
        if self.algorithm.train_encoder:
            features = self.algorithm.policy.features({key: array[unique] for key, array in sample.obs.items()})
        else:
            features = sample.features[unique]
        return self.algorithm.step(features, memory, inverse, row, sample.advantage[decision])

    def _update_critic(self, sample: Sample) -> float:
        losses = []
        for batch in self._minibatches(len(sample.kept), 1, self.config.critic_batch_size):
            decision = sample.kept[batch]
            loss = 0.5 * (self.critic(sample.features[decision]) - sample.target[decision]).square().mean()
            self.critic_optimizer.zero_grad(set_to_none=True)
            loss.backward()
            self._descend(self.critic_optimizer, self.critic_learning)
            losses.append(loss.detach())
        return torch.stack(losses).mean().item()

    def _minibatches(self, kept: int, rows: int, batch_size: int) -> Iterator[Tensor]:
        """Row numbers of all epochs' minibatches, of about equal size, as many in every process."""
        count = max(1, self.decisions * rows // batch_size)
        for _ in range(self.config.epochs):
            order = torch.randperm(kept * rows, generator=self.generator, device=self.generator.device)
            yield from order.tensor_split(count)

    def _check_first(self, sample: Sample, num_envs: int) -> dict[str, float]:
        """Before the first update the new policy is the old one, so that all ratios are 1."""
        batch = next(self._minibatches(len(sample.kept), self.algorithm.rows, self.config.batch_size)).sort().values
        largest = self._log_ratios(sample, batch).abs().max().item()
        if not largest < SAME_POLICY:
            raise FinetuneError(
                f"before the first update the log-ratio is {largest:.3g} where it must be 0: "
                "the update does not see the policy that collected the data"
            )
        return {"train/first_log_ratio": largest, **self._signal(sample, batch, num_envs)}

    def _signal(self, sample: Sample, batch: Tensor, num_envs: int) -> dict[str, float]:
        """The cosine of the gradients of two halves of a minibatch, from different environments: near 0 it is noise."""
        side = sample.kept[batch // self.algorithm.rows] % num_envs % 2
        halves = [batch[side == half] for half in (0, 1)]
        if not self.config.measure_signal or not all(map(len, halves)):
            return {}
        first, second = (self._gradient(sample, half) for half in halves)
        return {"train/signal": functional.cosine_similarity(first, second, dim=0).item()}

    def _gradient(self, sample: Sample, batch: Tensor) -> Tensor:
        total = torch.zeros((), device=batch.device)
        for part in torch.split(batch, self.micro_batch_size):
            loss = len(part) / len(batch) * self.step(sample, part).loss
            # What a part does not use has a gradient of 0: other parts may.
            gradients = torch.autograd.grad(loss, self.learning, allow_unused=True, materialize_grads=True)
            total = total + torch.cat([gradient.flatten() for gradient in gradients])
        return total

    def _encode(self, obs: Observation) -> Tensor:
        """Features [S, N, To, F] of observations {key: [S, N, To, ...]}, one decision of all environments at a time."""
        policy, decisions = self.algorithm.policy, len(next(iter(obs.values())))
        return torch.stack([policy.features({key: array[s] for key, array in obs.items()}) for s in range(decisions)])

    def _look(self, sample: Sample, batch: Tensor) -> Tensor:
        """Log-ratios of some rows of a minibatch, enough to tell a KL."""
        return self._log_ratios(sample, batch[:: len(batch) // LOOKED_AT or 1])

    @torch.no_grad()
    def _log_ratios(self, sample: Sample, batch: Tensor) -> Tensor:
        return torch.cat([self.step(sample, part).log_ratio for part in torch.split(batch, self.micro_batch_size)])

    def _kl(self, log_ratio: Tensor) -> float:
        """How far the policy has moved, by the rows of all processes."""
        kl: float = self.processes.total(kl_estimate(log_ratio).item()) / self.processes.count
        if not kl <= self.config.max_kl:
            raise FinetuneError(
                f"a minibatch moved the policy by a KL of {kl:.3g} (train.max_kl={self.config.max_kl:g}): lower "
                "train.lr or the clip range, or collect more decisions; the last checkpoint is kept"
            )
        return kl

    def _check_finite(self) -> None:
        parameters = [*self.learning, *self.critic_learning]
        if not bool(torch.stack([p.isfinite().all() for p in parameters]).all()):
            raise FinetuneError(
                "a weight is not finite after the update: lower train.lr or train.critic_lr; "
                "the last checkpoint is kept"
            )


def _numbers(steps: list[Step], row: Tensor, rows: int) -> dict[str, float]:
    """Means over an iteration's minibatches; of the clipped share also one per row of a decision."""
    clipped = torch.cat([step.clipped for step in steps]).float()
    numbers = {"train/loss": torch.stack([step.loss for step in steps]), "train/clipped": clipped}
    if rows > 1:
        numbers |= {f"clipped/{k}": clipped[row == k] for k in range(rows)}
    numbers |= {f"train/{name}": torch.stack([step.parts[name] for step in steps]) for name in steps[0].parts}
    return {name: values.mean().item() for name, values in numbers.items()}
