"""`flowsteer bench update`: one iteration of DPPO, split into collecting and learning, beside a straightforward one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, final

import torch
from accelerate import Accelerator
from omegaconf import DictConfig
from torch import Tensor, nn

from flowsteer.cli.bench import benchmark
from flowsteer.cli.checks import check_positive
from flowsteer.cli.devices import find_device
from flowsteer.cli.simulation import find_task, make_environments
from flowsteer.configs.simulation import SimOptions
from flowsteer.policies.denoising import DiffusionPolicy
from flowsteer.policies.encoders.low_dim import LowDim
from flowsteer.policies.networks.residual_mlp import ResidualMLP
from flowsteer.policies.samplers import Gaussian, transition
from flowsteer.policies.spec import PolicySpec
from flowsteer.policies.timing import timed
from flowsteer.rl_finetune.critic import Critic
from flowsteer.rl_finetune.dppo import DPPO
from flowsteer.rl_finetune.exploration import NoiseFloor
from flowsteer.rl_finetune.on_policy import FIRST_SEED, OnPolicy
from flowsteer.rl_finetune.on_policy_config import OnPolicyConfig
from flowsteer.rl_finetune.rollout import Rollout
from flowsteer.rl_finetune.statistics import fit_to_random_actions
from flowsteer.rl_finetune.update import Sample

FLOOR, CLIP = 0.1, 0.01


@final
@dataclass
class UpdateBenchmark:
    """The published size of an iteration on hopper.

    Attributes:
        num_envs: N.
        decisions: S, of each environment.
        steps: K, denoising steps.
        fine_tuned_steps: K'.
        epochs: passes over the iteration's rows.
        batch_size: rows of a minibatch, K' for each decision.
        hidden: width of the policy's network.
        blocks: its residual blocks.
        chunk_steps: control steps in a chunk.
        compile: measure an update with train.compile=true too.
        device: "auto" (a GPU where there is one) or "cpu".
        out: where to write update.json.
    """

    num_envs: int = 40
    decisions: int = 500
    steps: int = 20
    fine_tuned_steps: int = 10
    epochs: int = 5
    batch_size: int = 50_000
    hidden: int = 512
    blocks: int = 3
    chunk_steps: int = 4
    compile: bool = False
    device: str = "auto"
    out: str | None = None


def measure(config: DictConfig) -> dict[str, Any]:
    """`rows`: seconds of collecting and of learning of each contender, on the same decisions."""
    sizes = ("num_envs", "decisions", "steps", "fine_tuned_steps", "epochs", "batch_size", "hidden", "blocks")
    check_positive(config, *sizes, "chunk_steps")
    device = find_device(config.device)
    loop = _loop(config, device)
    with loop.env:
        loop.generator.manual_seed(0)
        rollout, collect_s = timed(loop.collect, device)
    seconds = {"flowsteer": timed(partial(loop.update, rollout, critic_alone=False), device)[1]}
    spent = {"collect_s": collect_s}
    if config.compile:
        faster = _loop(config, device, compile=True)
        faster.env.close()
        spent["compile_s"] = timed(partial(_warm_up, faster, rollout), device)[1]
        seconds["flowsteer, train.compile=true"] = timed(partial(faster.update, rollout, critic_alone=False), device)[1]
    seconds["straightforward"] = timed(partial(Straightforward(loop).update, rollout), device)[1]
    rows = [
        {"contender": name, "update_s": s, "speedup": seconds["straightforward"] / s} for name, s in seconds.items()
    ]
    env_steps = loop.progress.env_steps
    return {"rows": rows, **spent, "env_steps": env_steps, "collect_env_steps_per_s": env_steps / collect_s}


def _warm_up(loop: OnPolicy, rollout: Rollout) -> None:
    """Compile, which happens when rows first go forwards and backwards."""
    update = loop.update
    rows = torch.arange(min(update.micro_batch_size, loop.config.batch_size), device=loop.env.device)
    sample = update.sample(rollout)[0]
    with torch.no_grad():
        update.step(sample, rows)
    update.step(sample, rows).loss.backward()  # type: ignore[no-untyped-call]


def _loop(config: DictConfig, device: torch.device, compile: bool = False) -> OnPolicy:
    task = find_task("hopper", {})
    env = make_environments(task, SimOptions(num_envs=config.num_envs), config.num_envs, 1, device)
    spec = PolicySpec(
        dict(task.spec.observations), task.spec.action_dim, 1, config.chunk_steps, config.chunk_steps, 125.0
    )
    torch.manual_seed(0)
    network = partial(ResidualMLP, hidden=config.hidden, blocks=config.blocks)
    policy = DiffusionPolicy(spec, LowDim, network, steps=config.steps)
    fit_to_random_actions(policy, env, FIRST_SEED - config.num_envs)
    exploration = partial(NoiseFloor, first=FLOOR, last=FLOOR)
    algorithm = DPPO(policy.to(device), exploration, fine_tuned_steps=config.fine_tuned_steps, clip_first=CLIP)
    options = OnPolicyConfig(
        decisions=config.decisions,
        epochs=config.epochs,
        batch_size=config.batch_size,
        critic_batch_size=config.batch_size // config.fine_tuned_steps or 1,
        critic_warmup=0,
        compile=compile,
        target_kl=1e6,
        max_kl=1e6,
    )
    critic = Critic(spec.observation_steps * policy.encoder.feature_dim)
    return OnPolicy(algorithm, critic, env, options, accelerator=Accelerator(cpu=device.type == "cpu"))


@final
class Straightforward:
    """DPPO's update as its equations read, kept for comparison alone.

    Both networks are evaluated on every row and one answer is thrown away, each row encodes its observation and asks
    the critic, old log-probabilities are computed again after the rollout, the discount is a list of Python numbers.

    Args:
        loop: whose weights, sizes and rows it takes.
    """

    def __init__(self, loop: OnPolicy) -> None:
        algorithm = loop.algorithm
        assert isinstance(algorithm, DPPO)
        self.dppo, self.critic, self.config, self.loop = algorithm, loop.critic, loop.config, loop
        self.optimizer = torch.optim.AdamW([*algorithm.tuned.network.parameters(), *loop.critic.parameters()], lr=1e-4)

    def update(self, rollout: Rollout) -> None:
        """All epochs."""
        sample = self.loop.update.sample(rollout)[0]
        chain = sample.memory["chain"]
        total = len(chain) * self.dppo.rows
        with torch.no_grad():
            parts = [self._log_prob(sample, part) for part in torch.split(torch.arange(total), 10_000)]
        old = torch.cat(parts)
        for batch in self._minibatches(total):
            self._descend(sample, batch, old[batch])

    def _minibatches(self, total: int) -> Iterator[Tensor]:
        for _ in range(self.config.epochs):
            yield from torch.randperm(total).tensor_split(max(1, total // self.config.batch_size))

    def _descend(self, sample: Sample, batch: Tensor, old: Tensor) -> None:
        decision, row = batch // self.dppo.rows, batch % self.dppo.rows
        advantage = sample.advantage[decision]
        advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
        discount = torch.tensor([0.99 ** (self.dppo.rows - 1 - int(i)) for i in row])
        ratio = (self._log_prob(sample, batch) - old).exp()
        gained = advantage * discount.to(ratio.device)
        policy = torch.max(-gained * ratio, -gained * ratio.clamp(1 - CLIP, 1 + CLIP)).mean()
        value = 0.5 * (self.critic(self._features(sample, decision)) - sample.target[decision]).square().mean()
        self.optimizer.zero_grad()
        (policy + 0.5 * value).backward()
        nn.utils.clip_grad_norm_(self.dppo.tuned.network.parameters(), 1.0)
        self.optimizer.step()

    def _features(self, sample: Sample, decision: Tensor) -> Tensor:
        return self.dppo.tuned.features({key: array[decision] for key, array in sample.obs.items()})

    def _log_prob(self, sample: Sample, batch: Tensor) -> Tensor:
        batch = batch.to(sample.advantage.device)
        decision, row = batch // self.dppo.rows, batch % self.dppo.rows
        policy, frozen, grid = self.dppo.tuned, self.dppo.frozen, self.dppo.tuned.grid
        x_t, x_s = sample.memory["chain"][decision, row], sample.memory["chain"][decision, row + 1]
        k = self.dppo.first + row
        features = self._features(sample, decision)
        with torch.no_grad():
            thrown_away = frozen.denoise(x_t, grid[k], frozen.network.embed_observation(features))
        tuned = policy.denoise(x_t, grid[k], policy.network.embed_observation(features))
        a_hat = torch.where((k >= self.dppo.first)[:, None, None], tuned, thrown_away)
        mean, std = transition(policy.path, x_t, a_hat, grid[k], grid[k + 1], 1.0)
        return Gaussian(mean, std.clamp(min=FLOOR)).log_prob(x_s)[:, policy.spec.executed].mean((1, 2))


main = benchmark("update", "One iteration of DPPO beside a straightforward one.", UpdateBenchmark, measure)
