"""The choices of the command line: group -> name -> config.

Fields, types and defaults come from the constructors, so each has one source. A new network is its file and one line
below; so is a new encoder, policy family or task.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra_zen import builds
from omegaconf import MISSING

from flowsteer.policies.denoising import DiffusionPolicy, FlowPolicy
from flowsteer.policies.ebt import EnergyPolicy
from flowsteer.policies.encoders.cameras import Cameras
from flowsteer.policies.encoders.low_dim import LowDim
from flowsteer.policies.encoders.multi_modal import MultiModal
from flowsteer.policies.encoders.point_cloud import PointCloud
from flowsteer.policies.encoders.resnet import ResNet18
from flowsteer.policies.encoders.vit import SmallViT
from flowsteer.policies.gaussian import GaussianPolicy
from flowsteer.policies.networks.energy_transformer import EnergyTransformer
from flowsteer.policies.networks.residual_mlp import ResidualMLP
from flowsteer.policies.networks.transformer import DiffusionTransformer
from flowsteer.policies.networks.unet1d import ConditionalUnet1d
from flowsteer.sim.tasks.arm_lift import ArmLift
from flowsteer.sim.tasks.gymnasium_robotics import AdroitDoor, Kitchen
from flowsteer.sim.tasks.locomotion import HalfCheetah, Hopper, Walker2d
from flowsteer.sim.tasks.pusht import PushT
from flowsteer.sim.tasks.pusht_mj import PushTMujoco
from flowsteer.sim.tasks.robosuite import Can, Lift, Square, task_from_env_args


def later(target: Any, **fixed: Any) -> Any:
    """A config of everything in the constructor that has a default; the rest is given when it is built."""
    return builds(target, populate_full_signature=True, zen_partial=True, **fixed)


def _multi_modal(backbone: Any, **fixed: Any) -> Any:
    """Images through `backbone`, point clouds and vectors each in their way."""
    parts = {"images": later(Cameras, backbone=backbone), "points": later(PointCloud), "state": later(LowDim)}
    return later(MultiModal, **parts, **fixed)


def policy_choice(target: Any, *defaults: Any, **fixed: Any) -> dict[str, Any]:
    """A policy family without its spec, which comes from the data or the task; `defaults` choose from other groups."""
    config = builds(target, populate_full_signature=True, zen_exclude=("spec",), **fixed)
    return {"defaults": ["_self_", *defaults], "policy": config}


def _task(target: Any, *defaults: Any, horizon: tuple[int, int, int] = (2, 16, 8), **fixed: Any) -> dict[str, Any]:
    """A task and what suits it: `horizon` is To, Tp, Ta; `defaults` choose from other groups."""
    steps = dict(zip(("observation_steps", "prediction_steps", "execution_steps"), horizon, strict=True))
    task = builds(target, populate_full_signature=True, **fixed)
    return {"defaults": ["_self_", *defaults], "task": task, "horizon": steps}


DENOISERS: dict[str, Any] = {
    "mlp": later(ResidualMLP),
    "unet": later(ConditionalUnet1d),
    "transformer": later(DiffusionTransformer),
}
"""Networks that see the time; all of them can descend an energy as well."""

NETWORKS: dict[str, Any] = {**DENOISERS, "energy_transformer": later(EnergyTransformer)}

ENCODERS: dict[str, Any] = {
    "low_dim": later(LowDim),
    "image": _multi_modal(later(ResNet18)),
    "image_vit": _multi_modal(later(SmallViT)),
    "point_cloud": _multi_modal(later(ResNet18), point_keys=["point_cloud"]),
}

POLICIES: dict[str, Any] = {
    "diffusion": policy_choice(DiffusionPolicy, network=MISSING, encoder=MISSING),
    "flow": policy_choice(FlowPolicy, network=MISSING, encoder=MISSING),
    "ebt": policy_choice(EnergyPolicy, {"override /network": "energy_transformer"}, network=MISSING, encoder=MISSING),
    "gaussian": policy_choice(GaussianPolicy, {"override /network": None}, encoder=MISSING),
}

IMAGE = {"override /encoder": "image"}

TASKS: dict[str, Any] = {
    "pusht": _task(PushT),
    "pusht_mj": _task(PushTMujoco),
    "pusht_features": _task(PushT, observation="features"),
    "pusht_keypoints": _task(PushT, observation="keypoints"),
    "pusht_image": _task(PushT, IMAGE, observation="image"),
    "lift": _task(Lift),
    "lift_image": _task(Lift, IMAGE, images=True),
    "can": _task(Can),
    "can_image": _task(Can, IMAGE, images=True),
    "square": _task(Square),
    "square_image": _task(Square, IMAGE, images=True),
    "kitchen": _task(Kitchen),
    "adroit_door": _task(AdroitDoor),
    "hopper": _task(Hopper),
    "walker2d": _task(Walker2d),
    "halfcheetah": _task(HalfCheetah),
    "arm_lift": _task(ArmLift),
    # Where a robomimic data set says itself which environment it was recorded in.
    "robomimic": _task(task_from_env_args),
    # Demonstrations of a real robot: nothing to evaluate in.
    "none": {"task": None, "train": {"evaluate_every": 0}},
}

SIMULATED: dict[str, Any] = {
    name: choice["task"] for name, choice in TASKS.items() if name not in ("robomimic", "none")
}
"""The tasks that need nothing but their name."""

GROUPS: dict[str, tuple[dict[str, Any], str]] = {
    "network": (NETWORKS, "policy.network"),
    "encoder": (ENCODERS, "policy.encoder"),
    "policy": (POLICIES, "_global_"),
    "task": (TASKS, "_global_"),
}
"""Group -> its choices and where in the config they go."""


def register() -> None:
    """Tell Hydra."""
    store(GROUPS)


def store(groups: Mapping[str, tuple[Mapping[str, Any], str]]) -> None:
    """Tell Hydra of some groups."""
    known = ConfigStore.instance()
    for group, (choices, package) in groups.items():
        for name, config in choices.items():
            known.store(group=group, name=name, node=config, package=package)
