"""Options of `flowsteer rti`."""

from __future__ import annotations

from dataclasses import dataclass, field

from flowsteer.configs.evaluation import Executed
from flowsteer.configs.simulation import SimOptions


@dataclass
class RtiConfig:
    """What is tried, and how the choice is made.

    Attributes:
        checkpoint: a run folder (its last averaged weights), RUN/best, or a checkpoint; the choice is written into it.
        episodes: for each combination of `starts`, `steps` and `renoise`, the same ones.
        seed: of the first episode; keep it away from the seeds of training and of the final evaluation.
        starts: times of the path at which the previous chunk is taken up, each in (0, 1].
        steps: equal steps from there to 0.
        renoise: put the previous chunk on the path with new noise; false hands it to the network as it is.
        tolerance: mean maximum reward, and success, that the choice may lose.
        refresh_every: every so many decisions, sample from noise; 0 for never.
        jump: sample from noise when an observed number has changed by more since the last decision, in normalised
            units; 0 for never; when not given, by more than half as much again as ever without real-time iteration.
        binarise: take the nearer of their two values in the discrete dimensions.
        discrete_weight: factor of the discrete dimensions of the previous chunk, in [0, 1].
        task: a task's name; the one that the checkpoint was trained on when not given.
        weights: "ema" (averaged) or "weights".
        device: where the policy runs, "auto" (a GPU where there is one) or "cpu".
        out: where the table goes; CHECKPOINT/rti-EPISODESxSEED when not given.
    """

    checkpoint: str | None = None
    episodes: int = 50
    seed: int = 2_000_000
    starts: list[float] = field(default_factory=lambda: [0.2, 0.3, 0.5, 0.7, 1.0])
    steps: list[int] = field(default_factory=lambda: [1, 2])
    renoise: list[bool] = field(default_factory=lambda: [True])
    tolerance: float = 0.03
    refresh_every: int = 50
    jump: float | None = None
    binarise: bool = True
    discrete_weight: float = 1.0
    task: str | None = None
    weights: str = "ema"
    device: str = "auto"
    out: str | None = None
    horizon: Executed = field(default_factory=Executed)
    sim: SimOptions = field(default_factory=SimOptions)
