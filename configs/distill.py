"""Options of `flowsteer distill`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from flowsteer.configs.groups import later, store
from flowsteer.configs.simulation import SimOptions
from flowsteer.configs.train import LogOptions, TrainEvaluationOptions, TrainOptions
from flowsteer.policies.distillation import Distillation

LOSSES: dict[str, Any] = {
    "same_noise": later(Distillation),
    "consistency": later(Distillation, same_noise=0.0, consistency=1.0),
    "both": later(Distillation, same_noise=1.0, consistency=1.0),
}


@dataclass
class DistillTrainOptions(TrainOptions):
    """The loop's hyper-parameters, for a student that starts as its teacher.

    Attributes:
        ema_max_decay: of the average, which is also what the consistency loss aims at: news of the clean end of the
            path reach its noisy end one step of the grid after the other, each as late as the average.
    """

    lr: float = 3e-4
    ema_max_decay: float = 0.99


@dataclass
class DistillConfig:
    """Everything that makes a run.

    Attributes:
        checkpoint: the teacher, a diffusion or flow policy: a run folder (its last averaged weights), RUN/best, or a
            checkpoint.
        weights: of the teacher, "ema" (averaged) or "weights".
        steps: of the student, 1 to 4.
        teacher_steps: of the teacher while it teaches; its own when not given.
        dataset: observations to learn at; what the teacher was cloned from when not given.
        data: how they are used, beside what the teacher's run says, e.g. +data.in_memory=false.
        seed: of the order of the data and the noise.
        device: "auto" or "cpu".
        resume: a run folder to go on with; other options then change that run's.
        out: the run folder; runs/distilled-TIME when not given.
    """

    defaults: list[Any] = field(default_factory=lambda: ["_self_", {"loss": "same_noise"}])
    checkpoint: str | None = None
    weights: str = "ema"
    steps: int = 1
    teacher_steps: int | None = None
    dataset: str | None = None
    data: dict[str, Any] = field(default_factory=dict)
    out: str | None = None
    resume: str | None = None
    seed: int = 0
    device: str = "auto"
    loss: Any = MISSING
    train: DistillTrainOptions = field(default_factory=DistillTrainOptions)
    eval: TrainEvaluationOptions = field(default_factory=TrainEvaluationOptions)
    sim: SimOptions = field(default_factory=SimOptions)
    log: LogOptions = field(default_factory=LogOptions)


def register() -> None:
    """Tell Hydra."""
    store({"loss": (LOSSES, "loss")})
