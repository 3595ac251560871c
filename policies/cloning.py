"""Behaviour cloning: one loop for every policy family, and for whatever else a policy learns from batches.

The loop owns the weights, their average, the optimiser and the random numbers. Batches, the log and the evaluation
in simulation come in as arguments, so nothing here knows of data sets or simulators.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, final

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from flowsteer.policies import checkpoint
from flowsteer.policies.cloning_config import CloningConfig, learning_rate, make_optimizer
from flowsteer.policies.compiling import compiled
from flowsteer.policies.ema import Ema
from flowsteer.policies.errors import PolicyError
from flowsteer.policies.optimizer_state import pack_optimizer, unpack_optimizer
from flowsteer.policies.policy import Draws, Loss, Policy
from flowsteer.policies.precision import DTYPES, choose_dtype
from flowsteer.policies.random_state import pack_random, unpack_random
from flowsteer.policies.signals import StopRequest

Batch = Mapping[str, Any]


class Batches(Protocol):
    """An endless, resumable source of this process's part of each batch."""

    def __next__(self) -> Batch:
        """The next batch."""

    def state_dict(self) -> dict[str, Any]:
        """The position, as plain JSON values."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go back to a position."""


class Log(Protocol):
    """Where numbers go."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Record values by name at an optimiser step."""


class Objective(Protocol):
    """What is descended, a module: a policy's own loss, or another one of the policy."""

    def draw(self, batch_size: int, generator: torch.Generator | None = None) -> Draws:
        """The random numbers of one evaluation, each [B, ...] on the CPU."""

    def loss(self, batch: Batch, draws: Draws | None = None) -> Loss:
        """Of a batch in physical units; also what the module's `forward` is."""


Objectives = Callable[[Policy, Policy], Objective]
"""A policy and its average (twice the average, to validate that) -> what is descended."""


def own_loss(policy: Policy, average: Policy) -> Objective:
    """Behaviour cloning: the policy's own loss."""
    return policy


OPTIMIZER = "optimizer."
"""Prefix of the optimiser's tensors in a checkpoint."""
AGREE_EVERY = 10
"""Steps between the moments at which several processes ask each other whether to stop."""

Evaluate = Callable[[Policy, int], tuple[dict[str, float], float]]
"""Averaged policy, step -> numbers for the log, score (higher is better)."""


@final
@dataclass
class Progress:
    """What the loop counts."""

    step: int = 0
    best_score: float = -math.inf
    best_unsaved: bool = False
    saved_step: int = -1
    train_s: float = 0.0
    loss_sum: Tensor | None = field(default=None, repr=False)
    losses: int = 0


@final
class Cloning:
    """The state of a cloning run and its loop.

    Args:
        policy: with a fitted normaliser.
        config: hyper-parameters.
        batches: this process's part of each global batch.
        batch_size: rows of the global batch.
        seed: of the training noise, not negative; `seed_everything` has already seeded the weights.
        accelerator: devices and processes; defaults to one process on the CPU or the first GPU.
        folder: the run folder; None keeps nothing.
        describe: "policy", "spec" and whatever else a checkpoint's config.yaml is to hold.
        objective: what is descended, behaviour cloning unless told.

    Raises:
        PolicyError: the normaliser is not fitted, or `config.compile` where nothing can be compiled.
    """

    def __init__(
        self,
        policy: Policy,
        config: CloningConfig,
        batches: Batches,
        batch_size: int,
        *,
        seed: int = 0,
        accelerator: Accelerator | None = None,
        folder: Path | None = None,
        describe: Mapping[str, Any] | None = None,
        objective: Objectives = own_loss,
    ) -> None:
        policy.normalizer.check()
        self.accelerator = accelerator or Accelerator()
        self.device = self.accelerator.device
        self.policy = policy.to(self.device)
        self.config, self.batches, self.batch_size = config, batches, batch_size
        self.folder, self.describe = folder, dict(describe or {})
        self.ema = Ema(self.policy, config.ema_power, config.ema_max_decay)
        self.optimizer = make_optimizer(self.policy, config)
        self.seed, self.noise = seed, torch.Generator().manual_seed(seed)
        self.dtype = choose_dtype(config.precision, self.device)
        self.progress = Progress()
        self.objective, self.judged = objective(self.policy, self.ema.average), objective(*2 * [self.ema.average])
        model: nn.Module = self.accelerator.prepare(self.objective)
        self.model: Callable[[Batch, Draws], Loss] = compiled(model, self.device) if config.compile else model

    def train(
        self,
        log: Log,
        *,
        validation: Callable[[], Iterable[Batch]] | None = None,
        evaluate: Evaluate | None = None,
    ) -> bool:
        """Run to `config.steps`; False when a signal stopped it early (the last step is saved in both cases).

        Raises:
            PolicyError: the loss or the weights are not finite; the last good checkpoint stays.
        """
        every, progress = self.config, self.progress
        with StopRequest(patient=self.accelerator.num_processes > 1) as stop:
            while progress.step < self.config.steps and not self._stopped(stop):
                self._timed_update()
                if self._due(every.log_every):
                    log.log(progress.step, self._train_numbers())
                if validation is not None and self._due(every.validate_every):
                    log.log(progress.step, {"val/loss": self.validate(validation())})
                if self._due(every.evaluate_every):
                    self._evaluate(evaluate, log)
                if self._due(every.save_every) or progress.best_unsaved:
                    self.save()
            self.save()
        return progress.step >= self.config.steps

    def update(self, batch: Batch) -> Tensor:
        """One optimiser step; returns the loss without waiting for it."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.progress.step, self.config)
        self._seed_beside_main()
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            loss = self.model(self._to_device(batch), self._draws())
        self.optimizer.zero_grad(set_to_none=True)
        self.accelerator.backward(loss.total)
        nn.utils.clip_grad_norm_(self.policy.parameters(), self.config.grad_clip)
        self.optimizer.step()
        self.ema.update(self.policy)
        return loss.total.detach()

    @torch.no_grad()
    def validate(self, batches: Iterable[Batch]) -> float:
        """Mean loss of the averaged weights over `batches`, with the same noise at every call."""
        noise = torch.Generator().manual_seed(0)
        total, rows = 0.0, 0
        for batch in batches:
            size = len(batch["action"])
            loss = self.judged.loss(self._to_device(batch), self.judged.draw(size, noise))
            total, rows = total + loss.total.item() * size, rows + size
        return total / rows

    def save(self) -> None:
        """Write `folder/checkpoints/STEP`, point `last` (and `best`) at it, drop the others.

        Raises:
            PolicyError: the loss or the weights are not finite; nothing is written then.
        """
        self._check_finite()
        progress = self.progress
        if self.folder is not None and self.accelerator.is_main_process:
            target = self.folder / "checkpoints" / f"{progress.step:08d}"
            if progress.saved_step != progress.step:
                # What an earlier run left under this name is another state.
                shutil.rmtree(target, ignore_errors=True)
                checkpoint.save_checkpoint(target, self.policy, self.ema.average, self.describe, self.state())
            checkpoint.keep(self.folder, target, progress.best_unsaved)
        progress.best_unsaved, progress.saved_step = False, progress.step

    def state(self) -> checkpoint.TrainerState:
        """All that resuming needs beyond the two sets of weights."""
        random, tensors = pack_random()
        packed = pack_optimizer(self.optimizer, self.policy)
        tensors |= {f"{OPTIMIZER}{name}": value for name, value in packed.items()}
        tensors["noise"] = self.noise.get_state()
        progress = self.progress
        values = {
            "step": progress.step,
            "best_score": progress.best_score if math.isfinite(progress.best_score) else None,
            "train_s": progress.train_s,
            "ema_updates": self.ema.updates,
            "dtype": str(self.dtype).removeprefix("torch."),
            "batches": self.batches.state_dict(),
            "random": random,
        }
        return checkpoint.TrainerState(values, tensors)

    def resume(self, path: Path) -> None:
        """Take up the state of a checkpoint or run folder, so that going on equals never having stopped."""
        folder = checkpoint.resolve(path)
        state = checkpoint.load_trainer(folder)
        checkpoint.load_weights(self.policy, folder, "weights")
        checkpoint.load_weights(self.ema.average, folder, "ema")
        try:
            self._load_state(state)
        except (KeyError, TypeError) as error:
            raise PolicyError(f"{folder}: the training state lacks {error}: it cannot be resumed") from error

    def _load_state(self, state: checkpoint.TrainerState) -> None:
        values, tensors = state.values, state.tensors
        stored = {k.removeprefix(OPTIMIZER): v for k, v in tensors.items() if k.startswith(OPTIMIZER)}
        unpack_optimizer(self.optimizer, self.policy, stored)
        self.noise.set_state(tensors["noise"])
        best = -math.inf if values["best_score"] is None else values["best_score"]
        step = values["step"]
        self.progress = Progress(step, best_score=best, saved_step=step, train_s=values["train_s"])
        self.ema.updates = values["ema_updates"]
        if self.config.precision == "auto":
            self.dtype = DTYPES[values["dtype"]]
        self.batches.load_state_dict(values["batches"])
        unpack_random(values["random"], tensors)

    def _timed_update(self) -> None:
        started = time.perf_counter()
        loss = self.update(next(self.batches))
        progress = self.progress
        progress.loss_sum = loss if progress.loss_sum is None else progress.loss_sum + loss
        progress.losses += 1
        progress.step += 1
        progress.train_s += time.perf_counter() - started

    def _due(self, every: int) -> bool:
        """Whether something is due now that happens every so many steps, and at the last one."""
        step = self.progress.step
        return every > 0 and (step % every == 0 or step == self.config.steps)

    def _stopped(self, stop: StopRequest) -> bool:
        """Whether to stop: all processes agree, since one that leaves alone would let the others wait for ever."""
        if self.accelerator.num_processes == 1:
            return stop.requested
        if self.progress.step % AGREE_EVERY:
            return False
        flag = torch.tensor(float(stop.requested), device=self.device)
        return bool(self.accelerator.reduce(flag, "sum").item() > 0)

    def _check_finite(self) -> None:
        """What has run since the last line of the log, and what it made of the weights."""
        pending = self.progress.loss_sum
        values = [p.isfinite().all() for p in self.policy.parameters()]
        values += [pending.isfinite()] if pending is not None else []
        if not bool(torch.stack(values).all()):
            raise self._not_finite("the loss or a weight")

    def _not_finite(self, what: str) -> PolicyError:
        return PolicyError(
            f"{what} is not finite at step {self.progress.step}: lower train.lr or set train.precision=float32; "
            f"the last good checkpoint is kept"
        )

    def _train_numbers(self) -> dict[str, float]:
        progress = self.progress
        assert progress.loss_sum is not None
        # On a GPU this waits for the steps that were only launched: their time is training time.
        started = time.perf_counter()
        mean = self.accelerator.reduce(progress.loss_sum / progress.losses, "mean").item()
        progress.train_s += time.perf_counter() - started
        progress.loss_sum, progress.losses = None, 0
        if not math.isfinite(mean):
            raise self._not_finite("the loss")
        rate = learning_rate(progress.step - 1, self.config)
        return {"train/loss": mean, "train/lr": rate, "train/train_s": progress.train_s}

    def _evaluate(self, evaluate: Evaluate | None, log: Log) -> None:
        """Evaluate on the main process, the others wait; what the simulator draws must not change training's draws."""
        if self.accelerator.is_main_process and evaluate is not None:
            random, tensors = pack_random()
            try:
                numbers, score = evaluate(self.ema.average, self.progress.step)
            except Exception:
                # A simulator that fails must not cost what has been learnt.
                self.save()
                raise
            finally:
                unpack_random(random, tensors)
            log.log(self.progress.step, numbers)
            if score > self.progress.best_score:
                self.progress.best_score, self.progress.best_unsaved = score, True
        self.accelerator.wait_for_everyone()

    def _seed_beside_main(self) -> None:
        """Seed dropout and augmentation of the processes beside the main one, whose generators alone are saved.

        A seed per step, so that they differ between processes and are known again after resuming at any step.
        """
        if rank := self.accelerator.process_index:
            seed = np.random.SeedSequence([self.seed, rank, self.progress.step]).generate_state(1, np.uint64)
            torch.manual_seed(int(seed[0]))

    def _draws(self) -> Draws:
        """This process's slice of the draws of the global batch, the same for any number of processes."""
        processes, rank = self.accelerator.num_processes, self.accelerator.process_index
        rows = self.batch_size // processes
        draws = self.objective.draw(self.batch_size, self.noise)
        return tuple(draw[rank * rows : (rank + 1) * rows] for draw in draws)

    def _to_device(self, batch: Batch) -> dict[str, Any]:
        return {
            key: {k: v.to(self.device, non_blocking=True) for k, v in value.items()}
            if isinstance(value, Mapping)
            else value.to(self.device, non_blocking=True)
            for key, value in batch.items()
        }
