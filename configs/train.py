"""Options of `flowsteer train`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from hydra_zen import builds
from omegaconf import MISSING

from flowsteer.configs.evaluation import EvaluationOptions
from flowsteer.configs.simulation import SimOptions
from flowsteer.policies.cloning_config import CloningConfig

_LoopOptions: Any = builds(CloningConfig, populate_full_signature=True)


@dataclass
class TrainOptions(_LoopOptions):  # type: ignore[misc]
    """The loop's hyper-parameters.

    Attributes:
        batch_size: rows of the batch, over all processes together.
    """

    batch_size: int = 256


@dataclass
class Horizon:
    """How a policy sees time.

    Attributes:
        observation_steps: To, observed steps.
        prediction_steps: Tp, predicted steps (the chunk).
        execution_steps: Ta, executed steps.
    """

    observation_steps: int = 2
    prediction_steps: int = 16
    execution_steps: int = 8


@dataclass
class DataOptions:
    """How demonstrations are used.

    Attributes:
        names: {observation: key of the data set}, where they differ from what the task says.
        observations: with task=none, the keys that the policy sees.
        control_hz: with task=none, the control rate, where the data set does not tell.
        discrete: with task=none, the action dimensions that take one of two values, such as a gripper's.
        discrete_scale: what these two are to the network, plus and minus, in (0, 1].
        val_fraction: share of the episodes that validate.
        max_train_episodes: train on at most so many episodes.
        in_memory: false reads images from disk as they are needed.
        mirror: train on every episode's mirror image as well, where the task's world is symmetric.
        hindsight: move every episode so that it ends on the goal, where the task's goal can be moved.
    """

    names: dict[str, str] = field(default_factory=dict)
    observations: list[str] = field(default_factory=list)
    control_hz: float | None = None
    discrete: list[int] = field(default_factory=list)
    discrete_scale: float = 1.0
    val_fraction: float = 0.02
    max_train_episodes: int | None = None
    in_memory: bool = True
    mirror: bool = False
    hindsight: bool = False


@dataclass
class TrainEvaluationOptions(EvaluationOptions):
    """How a policy is judged while it trains, every `train.evaluate_every` steps.

    Attributes:
        episodes: how many.
        seed: of the first one; keep it away from the seeds of the final evaluation.
    """

    episodes: int = 50
    seed: int = 1_000_000


@dataclass
class LogOptions:
    """Where numbers go, besides metrics.jsonl and TensorBoard.

    Attributes:
        wandb: send them to Weights & Biases.
        project: there.
        name: of the run there; the run folder's name when not given.
    """

    wandb: bool = False
    project: str = "flowsteer"
    name: str | None = None


@dataclass
class TrainConfig:
    """Everything that makes a run.

    Attributes:
        dataset: demonstrations, in any known format.
        seed: of the weights, the order of the data and the noise.
        device: "auto" or "cpu".
        resume: a run folder to go on with; other options then change that run's.
        out: the run folder; runs/TASK-POLICY-TIME when not given.
    """

    defaults: list[Any] = field(
        default_factory=lambda: [
            "_self_",
            {"network": "mlp"},
            {"encoder": "low_dim"},
            {"policy": "flow"},
            # Last, so that a task may choose the encoder that suits it.
            {"task": "pusht"},
        ]
    )
    dataset: str | None = None
    out: str | None = None
    resume: str | None = None
    seed: int = 0
    device: str = "auto"
    task: Any = MISSING
    horizon: Horizon = field(default_factory=Horizon)
    policy: Any = MISSING
    data: DataOptions = field(default_factory=DataOptions)
    train: TrainOptions = field(default_factory=TrainOptions)
    eval: TrainEvaluationOptions = field(default_factory=TrainEvaluationOptions)
    sim: SimOptions = field(default_factory=SimOptions)
    log: LogOptions = field(default_factory=LogOptions)
