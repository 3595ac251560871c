"""Options of `flowsteer eval`, and what it shares with the evaluations during training."""

from __future__ import annotations

from dataclasses import dataclass, field

from flowsteer.configs.simulation import SimOptions


@dataclass
class EvaluationOptions:
    """How episodes are run.

    Attributes:
        delay_steps: simulated inference delay in env steps.
        videos: episodes to film.
    """

    delay_steps: int = 0
    videos: int = 3


@dataclass
class EvaluationConfig:
    """One evaluation.

    Attributes:
        checkpoint: a run folder (its last averaged weights), RUN/best, or a checkpoint.
        episodes: how many.
        seed: of the first episode; the others follow.
        task: a task's name; the one that the checkpoint was trained on when not given.
        weights: "ema" (averaged) or "weights".
        device: where the policy runs, "auto" (a GPU where there is one) or "cpu".
        out: where results go; CHECKPOINT/eval-EPISODESxSEED when not given.
    """

    checkpoint: str | None = None
    episodes: int = 100
    seed: int = 10_000
    task: str | None = None
    weights: str = "ema"
    device: str = "auto"
    out: str | None = None
    eval: EvaluationOptions = field(default_factory=EvaluationOptions)
    sim: SimOptions = field(default_factory=SimOptions)
