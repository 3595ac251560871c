"""What a robosuite environment is told: the scene, the controller, what is observed. Needs no robosuite itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, final

import numpy as np
from numpy.typing import NDArray

from flowsteer.sim.errors import SimError

Floats = NDArray[np.float64]

_SUPPORTED_CONTROLLER = {
    "type": "OSC_POSE",
    "impedance_mode": "fixed",
    "interpolation": None,
    "uncouple_pos_ori": True,
    "input_type": "delta",
    "input_max": 1,
    "input_min": -1,
}


@final
@dataclass(frozen=True)
class OscGains:
    """A delta pose controller: 6 numbers in [-1, 1] are scaled to metres and radians and added to the current pose.

    delta_max: [6] metres and radians of a full action; kp: [6] stiffness, 1/s^2; damping_ratio: 1 is critical;
    frame: whether deltas are along the axes of the robot's base or of the world.
    """

    delta_max: tuple[float, ...] = (0.05, 0.05, 0.05, 0.5, 0.5, 0.5)
    kp: tuple[float, ...] = (150.0,) * 6
    damping_ratio: float = 1.0
    frame: Literal["base", "world"] = "base"

    @staticmethod
    def from_robosuite(config: Mapping[str, Any]) -> OscGains:
        """Read robosuite's controller config: a part config (up to 1.4) or a composite one (from 1.5).

        Raises:
            SimError: if it is not an OSC_POSE delta controller with fixed impedance and no interpolation.
        """
        part = _arm_part(config)
        # Up to robosuite 1.4 deltas were along the world's axes and `control_delta` said what `input_type` says now.
        if "control_delta" in part:
            part["input_type"] = "delta" if part["control_delta"] else "absolute"
            part.setdefault("input_ref_frame", "world")
        for key, need in _SUPPORTED_CONTROLLER.items():
            if part.get(key, need) != need:
                raise SimError(f"controller {key}={part[key]!r} is not supported, only {need!r}")
        return OscGains(
            delta_max=_six(part.get("output_max", OscGains.delta_max)),
            kp=_six(part.get("kp", OscGains.kp)),
            damping_ratio=float(part.get("damping_ratio", OscGains.damping_ratio)),
            frame=part.get("input_ref_frame", "base"),
        )

    def to_robosuite(self) -> dict[str, Any]:
        """The composite controller config (robosuite 1.5) of a one-armed robot."""
        arm = {
            **_SUPPORTED_CONTROLLER,
            "output_max": list(self.delta_max),
            "output_min": [-x for x in self.delta_max],
            "kp": list(self.kp),
            "damping_ratio": self.damping_ratio,
            "kp_limits": [0, 300],
            "damping_ratio_limits": [0, 10],
            "position_limits": None,
            "orientation_limits": None,
            "input_ref_frame": self.frame,
            "ramp_ratio": 0.2,
            "gripper": {"type": "GRIP"},
        }
        return {"type": "BASIC", "body_parts": {"right": arm}}

    def rollout(self, position: Floats, velocity: Floats, actions: Floats, step_s: float) -> Floats:
        """Where actions [T, Da] bring the end effector from `position` [3] (m) and `velocity` [3] (m/s): [T, 3].

        Within a step the controlled arm is a unit mass on a spring and damper, x'' = kp (goal - x) - kd x', and the
        goal is the position at the step's start plus the scaled delta: from rest, 50 ms cover an eighth of it.
        """
        transition = _spring_step(np.array(self.kp[:3]), self.damping_ratio, step_s)
        deltas = np.clip(actions[:, :3], -1, 1) * self.delta_max[:3]
        positions = np.empty_like(deltas)
        for i, delta in enumerate(deltas):
            # State (x - goal, x'), and x - goal = -delta at the start of the step.
            offset, velocity = np.einsum("aij,ja->ia", transition, np.stack([-delta, velocity]))
            position = position + delta + offset
            positions[i] = position
        return positions


def _six(value: Any) -> tuple[float, ...]:
    return tuple(float(x) for x in np.broadcast_to(value, 6))


def _arm_part(config: Mapping[str, Any]) -> dict[str, Any]:
    parts = config.get("body_parts")
    if parts is None:
        return dict(config)
    parts = parts.get("arms", parts)
    if "right" not in parts:
        raise SimError(f"the controller config has no body part 'right', only {sorted(parts)}")
    return dict(parts["right"])


def _spring_step(kp: Floats, damping_ratio: float, step_s: float) -> Floats:
    """The exact transition [3, 2, 2] of (offset, velocity) of damped springs over one step."""
    from scipy.linalg import expm

    return np.stack([expm(step_s * np.array([[0, 1], [-k, -2 * damping_ratio * np.sqrt(k)]])) for k in kp])


ObjectLayout = Literal["1.4", "1.5"]


@final
@dataclass(frozen=True)
class World:
    """One of robosuite's environments: our name and theirs, the MuJoCo body of the object, the width of `object`."""

    name: str
    env_name: str
    object_body: str
    object_width: int


@final
@dataclass(frozen=True)
class RobosuiteSetup:
    """A world and how it is run.

    object_layout: the robosuite version whose order and signs `object` has.
    cameras: those observed as `<camera>_image`, image_size x image_size; none where `object` is observed.
    """

    world: World
    object_layout: ObjectLayout
    gains: OscGains
    control_hz: float
    cameras: tuple[str, ...]
    image_size: int
