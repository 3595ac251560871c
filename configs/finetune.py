"""Options of `flowsteer finetune`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from hydra_zen import builds
from omegaconf import MISSING

from flowsteer.configs.groups import GROUPS, POLICIES, later, store
from flowsteer.configs.simulation import SimOptions
from flowsteer.configs.train import Horizon, LogOptions, TrainEvaluationOptions
from flowsteer.rl_finetune.critic import Critic
from flowsteer.rl_finetune.dppo import DPPO
from flowsteer.rl_finetune.exploration import LearnedNoise, NoiseFloor
from flowsteer.rl_finetune.fpo import FPO
from flowsteer.rl_finetune.gaussian_ppo import GaussianPPO
from flowsteer.rl_finetune.on_policy_config import OnPolicyConfig

LoopOptions: Any = builds(OnPolicyConfig, populate_full_signature=True)
CriticOptions: Any = later(Critic)

EXPLORATIONS: dict[str, Any] = {"floor": later(NoiseFloor), "learned": later(LearnedNoise)}


def _algorithm(target: Any, train: dict[str, Any], *defaults: Any, **fixed: Any) -> dict[str, Any]:
    """An algorithm without the policy that it improves, and what suits it: `train` of the loop's options, `defaults`
    from other groups."""
    config = builds(target, populate_full_signature=True, zen_exclude=("policy",), **fixed)
    return {"defaults": ["_self_", *defaults], "algo": config, "train": train}


NO_EXPLORATION = {"override /exploration": None}
ALGORITHMS: dict[str, Any] = {
    # Its KL is of a mean over the chunk: 0.01 is a root mean square of 14 clip ranges of 0.01.
    "dppo": _algorithm(
        DPPO,
        {"batch_size": 5000, "epochs": 5, "lr": 2e-4, "target_kl": 0.01, "max_kl": 0.1},
        exploration=MISSING,
    ),
    "fpo": _algorithm(
        FPO, {"batch_size": 250, "epochs": 6, "lr": 3e-4, "target_kl": 0.1, "max_kl": 10.0}, NO_EXPLORATION
    ),
    "ppo": _algorithm(
        GaussianPPO, {"batch_size": 1000, "epochs": 8, "lr": 3e-4, "target_kl": 0.03, "max_kl": 3.0}, NO_EXPLORATION
    ),
}


def _from_nothing(choice: dict[str, Any]) -> dict[str, Any]:
    """A policy family that brings its network and encoder along, as there is none by default here."""
    usual = [{"override /encoder": "low_dim"}, {"override /network": "mlp"}]
    said = {key for default in choice["defaults"] if isinstance(default, dict) for key in default}
    return {**choice, "defaults": [*choice["defaults"], *(d for d in usual if not said & set(d))]}


@dataclass
class FinetuneConfig:
    """Everything that makes a run. Give either `checkpoint`, or `task` and `policy` to learn from nothing.

    Attributes:
        checkpoint: the cloned policy: a run folder (its last averaged weights), RUN/best, or a checkpoint.
        seed: of the noise, the order of the data and, from nothing, the weights.
        device: "auto" or "cpu".
        resume: a run folder to go on with; other options then change that run's.
        out: the run folder; runs/ALGO-TIME when not given.
        learn_in: arguments of the task it learns in that are not those of the task it is judged in, e.g.
            +learn_in.reward=coverage; the task itself suggests some.
        critic: of observations alone.
    """

    defaults: list[Any] = field(
        default_factory=lambda: [
            "_self_",
            {"network": None},
            {"encoder": None},
            {"policy": None},
            {"exploration": "floor"},
            {"algo": "dppo"},
            {"task": None},
        ]
    )
    checkpoint: str | None = None
    out: str | None = None
    resume: str | None = None
    seed: int = 0
    device: str = "auto"
    task: Any = None
    learn_in: dict[str, Any] = field(default_factory=dict)
    horizon: Horizon = field(default_factory=Horizon)
    policy: Any = None
    algo: Any = MISSING
    critic: CriticOptions = field(default_factory=CriticOptions)
    train: LoopOptions = field(default_factory=LoopOptions)
    eval: TrainEvaluationOptions = field(default_factory=TrainEvaluationOptions)
    sim: SimOptions = field(default_factory=SimOptions)
    log: LogOptions = field(default_factory=LogOptions)


def register() -> None:
    """Tell Hydra."""
    policies = {name: _from_nothing(choice) for name, choice in POLICIES.items()}
    chosen = {"policy": (policies, "_global_"), "exploration": (EXPLORATIONS, "algo.exploration")}
    store({**GROUPS, **chosen, "algo": (ALGORITHMS, "_global_")})
