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
class Executed:
    """How much of a chunk is executed.

    Attributes:
        execution_steps: Ta, executed steps; the checkpoint's own when not given.
    """

    execution_steps: int | None = None


@dataclass
class RtiChoice:
    """Real-time iteration; what is not given is as `flowsteer rti` chose it for the checkpoint.

    Attributes:
        start: time of the path at which the previous chunk is taken up, in (0, 1].
        steps: equal steps from there to 0.
        renoise: put the previous chunk on the path with new noise; false hands it to the network as it is.
        refresh_every: every so many decisions, sample from noise; 0 for never.
        jump: sample from noise when an observed number has changed by more since the last decision, in normalised
            units; 0 for never.
        binarise: take the nearer of their two values in the discrete dimensions.
        discrete_weight: factor of the discrete dimensions of the previous chunk, in [0, 1].
    """

    start: float | None = None
    steps: int | None = None
    renoise: bool | None = None
    refresh_every: int | None = None
    jump: float | None = None
    binarise: bool | None = None
    discrete_weight: float | None = None


@dataclass
class EvaluationConfig:
    """One evaluation.

    Attributes:
        checkpoint: a run folder (its last averaged weights), RUN/best, or a checkpoint.
        episodes: how many.
        seed: of the first episode; the others follow.
        task: a task's name; the one that the checkpoint was trained on when not given.
        weights: "ema" (averaged) or "weights".
        execution: "sync" samples each chunk from noise, "rti" starts it from the one before.
        device: where the policy runs, "auto" (a GPU where there is one) or "cpu".
        out: where results go; CHECKPOINT/eval-EPISODESxSEED when not given.
    """

    checkpoint: str | None = None
    episodes: int = 100
    seed: int = 10_000
    task: str | None = None
    weights: str = "ema"
    execution: str = "sync"
    device: str = "auto"
    out: str | None = None
    horizon: Executed = field(default_factory=Executed)
    rti: RtiChoice = field(default_factory=RtiChoice)
    eval: EvaluationOptions = field(default_factory=EvaluationOptions)
    sim: SimOptions = field(default_factory=SimOptions)
