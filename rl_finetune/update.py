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
"""Largest |log ratio| before anything has been learnt: more, and the update is not of the policy that collected. Of
a mean over a chunk's elements; a sum of them has as much more rounding."""
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
            numbers |= self._update_policy(sample, rollout.reward.shape[1])
            if self.algorithm.train_encoder:
                # The critic learns from what it will be asked: the observations as they are encoded from now on.
                sample = sample._replace(features=self._encode(sample.obs, rollout.reward.shape[1]))
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
        features = rollout.features
        value, next_value = (
            self.critic(part.flatten(0, 1)).view_as(reward) for part in (features, self._led_to(rollout))
        )
        if config.scale_rewards:
            known = torch.where(rollout.kept, reward, 0.0)
            self.reward_scale.update(self.processes.gather(known), self.processes.gather(rollout.ended))
            reward = self.reward_scale(reward)
        ends = (rollout.terminated, rollout.ended, rollout.kept)
        advantage = gae(reward, value, next_value, *ends, config.gamma, config.lam)
        target, kept = (advantage + value).flatten(), rollout.kept.flatten()
        left, spread = (values[kept].var(correction=0).item() for values in (advantage.flatten(), target))
        mean, std = self.processes.moments(advantage.flatten()[kept])
        normalized = (advantage.flatten() - mean) / (std + 1e-8)
        obs = {key: array.flatten(0, 1) for key, array in rollout.obs.items()}
        numbers = {
            # Where all returns are the same there is nothing to explain.
            "train/explained_variance": 1 - left / spread if spread > 1e-12 else 0.0,
            "train/advantage_std": std.item(),
            "train/reward_std": self.reward_scale.std,
            "collect/lost": float((~kept).sum()),
        }
        numbered = kept.nonzero()[:, 0]
        return Sample(obs, features.flatten(0, 1), rollout.flat_memory, normalized, target, numbered), numbers

    def _update_policy(self, sample: Sample, num_envs: int) -> dict[str, float]:
        """Epochs over shuffled rows, until the policy has moved as far as it may."""
        rows, kl = self.algorithm.rows, 0.0
        steps: list[Step] = []
        taken: list[Tensor] = []
        numbers: dict[str, float] = {}
        for batch in self._minibatches(len(sample.kept), rows, self.config.batch_size):
            # A decision's rows side by side: it is encoded in one part of the minibatch, not in several.
            batch = batch.sort().values
            self.optimizer.zero_grad(set_to_none=True)
            if steps:
                step = self._accumulate(sample, batch)
            else:
                batch, step, numbers = self._first_minibatch(sample, batch, num_envs)
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
        numbers |= _numbers(steps, torch.cat(taken), rows) if steps else {}
        return {"train/kl": kl, "train/minibatches": float(len(steps)), **numbers}

    def _descend(self, optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter]) -> None:
        """One step along the gradients that are there."""
        self.processes.average_gradients(parameters)
        nn.utils.clip_grad_norm_(parameters, self.config.grad_clip)
        optimizer.step()

    def _first_minibatch(self, sample: Sample, batch: Tensor, num_envs: int) -> tuple[Tensor, Step, dict[str, float]]:
        """The gradients of an iteration's first minibatch, in its halves of the one and the other environments.

        The new policy is still the old one there, so that all ratios are 1. The cosine of the halves' gradients tells
        what there is to learn: near 0 they are noise.
        """
        side = sample.kept[batch // self.algorithm.rows] % num_envs % 2
        halves = [half for which in (0, 1) if len(half := batch[side == which])]
        steps, sums = [], []
        for half in halves:
            steps.append(self._accumulate(sample, half, len(half) / len(batch)))
            sums.append(self._gradient())
        batch, step = torch.cat(halves), Step.sum(steps)
        numbers = {"train/first_log_ratio": self._check_same(sample, batch, step)}
        if len(halves) == 2:
            numbers["train/signal"] = functional.cosine_similarity(sums[0], sums[1] - sums[0], dim=0).item()
        return batch, step, numbers

    def _check_same(self, sample: Sample, batch: Tensor, step: Step) -> float:
        """The largest |log ratio| of rows that nothing has been learnt from; augmentation apart."""
        log_ratio = self._log_ratios(sample, batch) if self.algorithm.train_encoder else step.log_ratio
        largest = log_ratio.abs().max().item()
        if not largest < SAME_POLICY * self.algorithm.scale:
            raise FinetuneError(
                f"before the first update the log-ratio is {largest:.3g} where it must be 0: "
                "the update does not see the policy that collected the data"
            )
        return largest

    def _gradient(self) -> Tensor:
        """A copy of what has been accumulated, flat; weights that have no part in it have 0."""
        gradients = (torch.zeros_like(p) if p.grad is None else p.grad for p in self.learning)
        return torch.cat([gradient.flatten() for gradient in gradients])

    def _accumulate(self, sample: Sample, batch: Tensor, of_all: float = 1.0) -> Step:
        """Add the gradients of a minibatch, or of a share of one, part after part, so that its size costs no memory."""
        encoder, steps = self.algorithm.policy.encoder, []
        # In training mode it augments, which is for minibatches alone.
        encoder.train(self.algorithm.train_encoder)
        try:
            for part in torch.split(batch, self.micro_batch_size):
                step, share = self.step(sample, part), of_all * len(part) / len(batch)
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

    def _led_to(self, rollout: Rollout) -> Tensor:
        """Features [S, N, To, F] of the observation at the end of each chunk."""
        num_envs = rollout.reward.shape[1]
        led_to = torch.cat([rollout.features[1:], self._encode(rollout.next_obs, num_envs)[None]])
        if len(next(iter(rollout.ended_obs.values()))):
            led_to[rollout.ended] = self._encode(rollout.ended_obs, num_envs)
        return led_to

    @torch.no_grad()
    def _encode(self, obs: Observation, size: int) -> Tensor:
        """Features [B, To, F] of observations {key: [B, To, ...]}, `size` at a time."""
        parts = zip(*(torch.split(array, size) for array in obs.values()), strict=True)
        return torch.cat([self.algorithm.policy.features(dict(zip(obs, part, strict=True))) for part in parts])

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
