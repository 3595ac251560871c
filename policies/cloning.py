"""Behaviour cloning: one loop for every policy family.

The loop owns the weights, their average, the optimiser and the random numbers. Batches, the log and the evaluation
in simulation come in as arguments, so nothing here knows of data sets or simulators.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, final

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from flowsteer.policies import checkpoint
from flowsteer.policies.ema import Ema
from flowsteer.policies.errors import PolicyError
from flowsteer.policies.policy import Draws, Loss, Policy
from flowsteer.policies.precision import choose_dtype
from flowsteer.policies.random_state import pack_random, unpack_random
from flowsteer.policies.signals import StopRequest
from flowsteer.policies.spec import configurable

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


Evaluate = Callable[[Policy, int], tuple[dict[str, float], float]]
"""Averaged policy, step -> numbers for the log, score (higher is better)."""


@configurable
@dataclass(frozen=True)
class CloningConfig:
    """Hyper-parameters of the loop; `every` values count optimiser steps, 0 means never.

    Attributes:
        steps: optimiser steps in all; the cosine schedule ends there.
        lr: peak learning rate of AdamW.
        beta2: second moment decay of AdamW.
        weight_decay: on matrices only, not on biases and norms.
        warmup_steps: linear warm-up.
        grad_clip: largest gradient norm.
        ema_power: warm-up of the average, see `Ema`.
        ema_max_decay: its final decay.
        precision: "auto" (bfloat16 where it is measured to be faster), "float32" or "bfloat16".
        compile: run the loss through torch.compile.
        log_every: steps between lines of the log.
        validate_every: steps between validation losses.
        evaluate_every: steps between evaluations in simulation.
        save_every: steps between checkpoints (the last step always makes one).
    """

    steps: int = 20000
    lr: float = 1e-3
    beta2: float = 0.95
    weight_decay: float = 1e-4
    warmup_steps: int = 500
    grad_clip: float = 1.0
    ema_power: float = 0.75
    ema_max_decay: float = 0.999
    precision: str = "auto"
    compile: bool = False
    log_every: int = 100
    validate_every: int = 1000
    evaluate_every: int = 5000
    save_every: int = 1000

    def __post_init__(self) -> None:
        if self.steps < 1 or self.lr <= 0 or self.log_every < 1:
            raise PolicyError(
                f"train.steps, train.lr and train.log_every must be positive, got {self.steps}, {self.lr:g}, "
                f"{self.log_every}"
            )


def learning_rate(step: int, config: CloningConfig) -> float:
    """Linear warm-up, then half a cosine down to 0 at `config.steps`."""
    warmup = min(1.0, (step + 1) / max(1, config.warmup_steps))
    progress = max(0, step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return config.lr * warmup * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def make_optimizer(policy: Policy, config: CloningConfig) -> torch.optim.AdamW:
    """AdamW, fused, with decay on matrices only."""
    matrices = [p for p in policy.parameters() if p.requires_grad and p.ndim >= 2]
    others = [p for p in policy.parameters() if p.requires_grad and p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, config.beta2), fused=True)


@dataclass
class Progress:
    """What the loop counts."""

    step: int = 0
    best_score: float = -math.inf
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
        seed: of the training noise; `seed_everything` has already seeded the weights.
        accelerator: devices and processes; defaults to one process on the CPU or the first GPU.
        folder: the run folder; None keeps nothing.
        describe: "policy", "spec" and whatever else a checkpoint's config.yaml is to hold.
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
    ) -> None:
        policy.normalizer.check()
        self.accelerator = accelerator or Accelerator()
        self.device = self.accelerator.device
        self.policy = policy.to(self.device)
        self.config, self.batches, self.batch_size = config, batches, batch_size
        self.folder, self.describe = folder, dict(describe or {})
        self.ema = Ema(self.policy, config.ema_power, config.ema_max_decay)
        self.optimizer = make_optimizer(self.policy, config)
        self.noise = torch.Generator().manual_seed(seed)
        self.dtype = choose_dtype(config.precision, self.device)
        self.progress = Progress()
        model: nn.Module = self.accelerator.prepare(self.policy)
        self.model: Callable[[Batch, Draws], Loss] = torch.compile(model) if config.compile else model

    def train(
        self,
        log: Log,
        *,
        validation: Callable[[], Iterable[Batch]] | None = None,
        evaluate: Evaluate | None = None,
    ) -> bool:
        """Run to `config.steps`; False when a signal stopped it early (the last step is saved in both cases)."""
        every, progress = self.config, self.progress
        with StopRequest() as stop:
            while progress.step < self.config.steps and not stop.requested:
                self._timed_update()
                if self._due(every.log_every):
                    log.log(progress.step, self._train_numbers())
                if validation is not None and self._due(every.validate_every):
                    log.log(progress.step, {"val/loss": self.validate(validation())})
                if evaluate is not None and self._due(every.evaluate_every):
                    self._evaluate(evaluate, log)
                if self._due(every.save_every) or self._best_unsaved:
                    self.save()
            self.save()
        return progress.step >= self.config.steps

    def update(self, batch: Batch) -> Tensor:
        """One optimiser step; returns the loss without waiting for it."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.progress.step, self.config)
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
            loss = self.ema.average.loss(self._to_device(batch), self.ema.average.draw(size, noise))
            total, rows = total + loss.total.item() * size, rows + size
        return total / rows

    def save(self) -> None:
        """Write `folder/checkpoints/STEP`, point `last` (and `best`) at it, drop the others."""
        if self.folder is not None and self.accelerator.is_main_process:
            target = self.folder / "checkpoints" / f"{self.progress.step:08d}"
            if not target.exists():
                checkpoint.save_checkpoint(target, self.policy, self.ema.average, self.describe, self.state())
            checkpoint.link(self.folder, "last", target)
            if self._best_unsaved:
                checkpoint.link(self.folder, "best", target)
            checkpoint.prune(self.folder)
        self._best_unsaved = False

    def state(self) -> checkpoint.TrainerState:
        """All that resuming needs beyond the two sets of weights."""
        random, tensors = pack_random()
        for name, parameter in self.policy.named_parameters():
            slots = self.optimizer.state.get(parameter, {})
            tensors |= {f"optimizer.{slot}.{name}": value for slot, value in slots.items()}
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
        for name, parameter in self.policy.named_parameters():
            slots = ("step", "exp_avg", "exp_avg_sq")
            self.optimizer.state[parameter] = {
                s: tensors[f"optimizer.{s}.{name}"].to(self.device if s != "step" or parameter.is_cuda else "cpu")
                for s in slots
                if parameter.requires_grad
            }
        self.noise.set_state(tensors["noise"])
        best = values["best_score"]
        self.progress = Progress(values["step"], -math.inf if best is None else best, values["train_s"])
        self.ema.updates = values["ema_updates"]
        self.dtype = getattr(torch, values["dtype"])
        self.batches.load_state_dict(values["batches"])
        unpack_random(values["random"], tensors)

    _best_unsaved = False

    def _timed_update(self) -> None:
        started = time.perf_counter()
        loss = self.update(next(self.batches))
        progress = self.progress
        progress.loss_sum = loss if progress.loss_sum is None else progress.loss_sum + loss
        progress.losses += 1
        progress.step += 1
        progress.train_s += time.perf_counter() - started

    def _due(self, every: int) -> bool:
        return every > 0 and self.progress.step % every == 0

    def _train_numbers(self) -> dict[str, float]:
        progress = self.progress
        assert progress.loss_sum is not None
        mean = self.accelerator.reduce(progress.loss_sum / progress.losses, "mean").item()
        progress.loss_sum, progress.losses = None, 0
        if not math.isfinite(mean):
            raise PolicyError(
                f"the loss is {mean} at step {progress.step}: lower train.lr or train.precision=float32; "
                f"the last good checkpoint is kept"
            )
        rate = learning_rate(progress.step - 1, self.config)
        return {"train/loss": mean, "train/lr": rate, "train/train_s": progress.train_s}

    def _evaluate(self, evaluate: Evaluate, log: Log) -> None:
        """Evaluate on the main process; what the simulator draws must not change what training draws."""
        if self.accelerator.is_main_process:
            random, tensors = pack_random()
            numbers, score = evaluate(self.ema.average, self.progress.step)
            unpack_random(random, tensors)
            log.log(self.progress.step, numbers)
            if score > self.progress.best_score:
                self.progress.best_score, self._best_unsaved = score, True
        self.accelerator.wait_for_everyone()

    def _draws(self) -> Draws:
        """This process's slice of the draws of the global batch, the same for any number of processes."""
        processes, rank = self.accelerator.num_processes, self.accelerator.process_index
        rows = self.batch_size // processes
        draws = self.policy.draw(self.batch_size, self.noise)
        return tuple(draw[rank * rows : (rank + 1) * rows] for draw in draws)

    def _to_device(self, batch: Batch) -> dict[str, Any]:
        return {
            key: {k: v.to(self.device, non_blocking=True) for k, v in value.items()}
            if isinstance(value, Mapping)
            else value.to(self.device, non_blocking=True)
            for key, value in batch.items()
        }
