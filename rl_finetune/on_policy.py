"""The one loop of on-policy fine-tuning: collect, update, log, judge, save."""

from __future__ import annotations

import itertools
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from flowsteer.policies import checkpoint
from flowsteer.policies.cloning import Evaluate, Log
from flowsteer.policies.compiling import compile_in_place, uncompiled
from flowsteer.policies.optimizer_state import pack_optimizer, unpack_optimizer
from flowsteer.policies.signals import StopRequest
from flowsteer.rl_finetune.algorithm import Algorithm
from flowsteer.rl_finetune.critic import Critic
from flowsteer.rl_finetune.errors import FinetuneError
from flowsteer.rl_finetune.on_policy_config import OnPolicyConfig
from flowsteer.rl_finetune.processes import Processes
from flowsteer.rl_finetune.rollout import Episodes, Rollout, collect
from flowsteer.rl_finetune.update import Update
from flowsteer.sim.vec_env import Observation, VecEnv

FIRST_SEED = 100_000_000
"""Of the episodes to learn from; evaluations have theirs far below."""


@final
@dataclass
class Progress:
    """What the loop counts, over all processes."""

    iteration: int = 0
    env_steps: int = 0
    decisions: int = 0
    next_seed: int = FIRST_SEED
    best_score: float | None = None


@final
class OnPolicy:
    """The state of a fine-tuning run and its loop.

    Args:
        algorithm: with the cloned policy.
        critic: of the policy's encoded observations.
        env: N environments that nobody else steps.
        config: hyper-parameters.
        seed: of the exploration.
        accelerator: devices and processes; each process has its own environments, gradients are averaged.
        folder: the run folder; None keeps nothing.
        describe: what a checkpoint's config.yaml is to hold, "policy" being that of `algorithm.acting()`.

    Raises:
        PolicyError: `config.compile` where nothing can be compiled.
    """

    def __init__(
        self,
        algorithm: Algorithm,
        critic: Critic,
        env: VecEnv,
        config: OnPolicyConfig,
        *,
        seed: int = 0,
        accelerator: Accelerator | None = None,
        folder: Path | None = None,
        describe: Mapping[str, Any] | None = None,
    ) -> None:
        accelerator = accelerator or Accelerator(cpu=env.device.type == "cpu")
        self.processes = Processes(accelerator)
        self.algorithm, self.critic = algorithm.to(accelerator.device).eval(), critic.to(accelerator.device)
        self.acting = algorithm.acting().eval()
        if config.compile:
            # Who judges counts the network's evaluations by a hook, which a compiled network does not call.
            self.acting = uncompiled(self.acting)
            compile_in_place(algorithm.network, accelerator.device)
        self.env, self.config, self.folder, self.describe = env, config, folder, dict(describe or {})
        self.seed, self.generator = seed, torch.Generator(accelerator.device)
        self.decisions = config.decisions * env.num_envs * self.processes.count
        self.update = Update(algorithm, critic, config, self.processes, self.decisions, self.generator)
        self.episodes = Episodes(env.num_envs, env.device)
        self.progress, self.obs = Progress(), None
        self._saved, self._best_unsaved, self._counted = -1, False, 0

    obs: Observation | None

    def train(self, log: Log, evaluate: Evaluate | None = None) -> bool:
        """Run to `config.env_steps`; False when a signal stopped it early (the last iteration is saved in both cases).

        Raises:
            FinetuneError: the update is not of the policy that collected, has blown up, or the task gave what is not
                finite; the last checkpoint stays.
        """
        config, progress = self.config, self.progress
        with StopRequest(patient=self.processes.count > 1) as stop:
            if not progress.iteration:
                self._evaluate(evaluate, log)
                self.save()
            while progress.env_steps < config.env_steps and not self.processes.total(stop.requested):
                self._seed()
                started = time.perf_counter()
                rollout = self.collect()
                collected = time.perf_counter()
                numbers = self.update(rollout, critic_alone=progress.iteration < config.critic_warmup)
                progress.iteration += 1
                times = self._times(collected - started, time.perf_counter() - collected)
                log.log(progress.env_steps, {**self.episodes.numbers(), **numbers, **times})
                judging, saving = self._due(config.evaluate_every), self._due(config.save_every)
                # What runs in a simulator is in no checkpoint: for exact resuming, episodes end where one may be.
                if judging or saving or progress.iteration % config.restart_every == 0:
                    self._restart()
                if judging:
                    self._evaluate(evaluate, log)
                if saving or self._best_unsaved:
                    self.save()
            self._restart()
            self.save()
        return progress.env_steps >= config.env_steps

    def collect(self) -> Rollout:
        """S decisions in every environment."""
        progress, processes = self.progress, self.processes
        if self.obs is None:
            self.obs = self.env.reset(itertools.count(progress.next_seed + processes.rank, processes.count))
            self.episodes = Episodes(self.env.num_envs, self.env.device)
        self.algorithm.progress = min(1.0, progress.env_steps / self.config.env_steps)
        rollout, env_steps = collect(
            self.algorithm, self.env, self.obs, self.config.decisions, self.generator, self.episodes
        )
        self.obs = rollout.next_obs
        progress.env_steps += round(processes.total(env_steps))
        progress.decisions += self.decisions
        return rollout

    def save(self) -> None:
        """Write `folder/checkpoints/ENV_STEPS`."""
        progress, folder = self.progress, self.folder
        if folder is not None and self.processes.rank == 0:
            target = folder / "checkpoints" / f"{progress.env_steps:09d}"
            if self._saved != progress.env_steps:
                # What an earlier run left under this name is another state.
                shutil.rmtree(target, ignore_errors=True)
                checkpoint.save_checkpoint(target, self.acting, self.acting, self.describe, self.state())
            checkpoint.keep(folder, target, self._best_unsaved)
        self._saved, self._best_unsaved = progress.env_steps, False

    def state(self) -> checkpoint.TrainerState:
        """All that resuming needs; the random numbers of an iteration follow from its seed."""
        update = self.update
        parts = {
            "algorithm": self.algorithm.state_dict(),
            "critic": self.critic.state_dict(),
            "optimizer": pack_optimizer(update.optimizer, self.algorithm),
            "critic_optimizer": pack_optimizer(update.critic_optimizer, self.critic),
        }
        tensors = {f"{part}.{name}": value.detach() for part, named in parts.items() for name, value in named.items()}
        values = {
            "progress": asdict(self.progress),
            "gradient_steps": update.gradient_steps,
            "reward_scale": update.reward_scale.state_dict(),
        }
        return checkpoint.TrainerState(values, tensors)

    def resume(self, path: Path) -> None:
        """Take up the state of a checkpoint or run folder, so that going on equals never having stopped."""
        folder = checkpoint.resolve(path)
        state = checkpoint.load_trainer(folder)
        try:
            self._load_state(state)
        except (KeyError, TypeError, RuntimeError) as error:
            # What torch says in its first line is only which module it was.
            reason = str(error).splitlines()[-1].strip()
            raise FinetuneError(
                f"{folder}: the training state does not fit ({reason}): it cannot be resumed"
            ) from error
        self._saved = self._counted = self.progress.env_steps

    def _load_state(self, state: checkpoint.TrainerState) -> None:
        parts: dict[str, dict[str, Tensor]] = {}
        for key, value in state.tensors.items():
            part, _, name = key.partition(".")
            parts.setdefault(part, {})[name] = value
        self.algorithm.load_state_dict(parts["algorithm"])
        self.critic.load_state_dict(parts["critic"])
        unpack_optimizer(self.update.optimizer, self.algorithm, parts.get("optimizer", {}))
        unpack_optimizer(self.update.critic_optimizer, self.critic, parts.get("critic_optimizer", {}))
        self.progress = Progress(**state.values["progress"])
        self.update.gradient_steps = state.values["gradient_steps"]
        self.update.reward_scale.load_state_dict(state.values["reward_scale"])

    def _restart(self) -> None:
        """Let all environments of all processes start new episodes."""
        if self.obs is None:
            return
        self.progress.next_seed = self.processes.largest(max(self.env.seeds)) + 1
        self.update.reward_scale.restart()
        self.obs = None

    def _seed(self) -> None:
        """An iteration's random numbers are a function of the run's seed, the process and the iteration alone."""
        entropy = [self.seed, self.processes.rank, self.progress.iteration]
        here, anywhere = np.random.SeedSequence(entropy).generate_state(2, np.uint64)
        self.generator.manual_seed(int(here))
        torch.manual_seed(int(anywhere))

    def _due(self, every: int) -> bool:
        last = self.progress.env_steps >= self.config.env_steps
        return every > 0 and (last or self.progress.iteration % every == 0)

    def _evaluate(self, evaluate: Evaluate | None, log: Log) -> None:
        """Judge the acting policy on the main process, the others wait for what it says."""
        progress, better = self.progress, False
        if evaluate is not None and self.config.evaluate_every and not self.processes.rank:
            try:
                numbers, score = evaluate(self.acting, progress.env_steps)
            except Exception:
                # A simulator that fails must not cost what has been learnt.
                self.save()
                raise
            log.log(progress.env_steps, numbers)
            better = progress.best_score is None or score > progress.best_score
            progress.best_score = score if better else progress.best_score
        # All processes must know, since saving is something that they do together.
        self._best_unsaved |= self.processes.total(better) > 0

    def _times(self, collect_s: float, update_s: float) -> dict[str, float]:
        """Of this iteration, and what has been counted since the beginning."""
        progress, steps = self.progress, self.progress.env_steps
        now, self._counted = steps - self._counted, steps
        return {
            "count/decisions": float(progress.decisions),
            "count/gradient_steps": float(self.update.gradient_steps),
            "time/collect_s": collect_s,
            "time/update_s": update_s,
            "time/collect_env_steps_per_s": now / collect_s,
            "time/update_env_steps_per_s": now / update_s,
            "time/env_steps_per_s": now / (collect_s + update_s),
        }
