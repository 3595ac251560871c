"""What a policy promises about its inputs and outputs.

Dimension letters used in this room:
B batch, To observation steps, Tp predicted steps (the chunk), Ta executed steps,
Do / Da observation / action width, F feature width, K denoising steps.

The chunk starts at the first observed step, so that step i of the chunk is at time i - (To - 1)::

    step            0 ... To-1 ... To-2+Ta ... Tp-1
    observed        yes   yes      no          no
    predicted       yes   yes      yes         yes
    executed        no    yes      yes         no        hence To - 1 + Ta <= Tp
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, TypeVar, final

from flowsteer.policies.errors import PolicyError

Block = TypeVar("Block")


def configurable(block: Block) -> Block:
    """Mark a class (with its subclasses) or a function as one that a config may build.

    A config may come with a stranger's checkpoint: whatever carries this mark must be harmless with any arguments, so
    it opens no file, imports nothing by name and starts nothing.
    """
    setattr(block, "configurable", True)  # noqa: B010 - mypy knows no such attribute
    return block


@final
@configurable
@dataclass(frozen=True)
class ArraySpec:
    """One array of one time step: `shape` without batch and time; `dtype` "float32" or "uint8" (images H, W, C)."""

    shape: tuple[int, ...]
    dtype: str = "float32"


@final
@configurable
@dataclass(frozen=True)
class PolicySpec:
    """The frozen contract stored in a checkpoint.

    Attributes:
        discrete: action dimensions that take one of two values, such as a gripper that is opened or closed.
        discrete_scale: these two are -discrete_scale and discrete_scale to the network, in (0, 1]; below 1 they are
            decided late in the denoising, and a chunk that starts from an earlier one can still change them.

    Raises:
        PolicyError: if To - 1 + Ta > Tp, a size or the control rate is not positive, or there is no such dimension.
    """

    observations: Mapping[str, ArraySpec]
    action_dim: int
    observation_steps: int
    prediction_steps: int
    execution_steps: int
    control_hz: float
    discrete: tuple[int, ...] = ()
    discrete_scale: float = 1.0

    def __post_init__(self) -> None:
        if not self.observations:
            raise PolicyError("a policy needs at least one observation")
        for name in ("action_dim", "observation_steps", "prediction_steps", "execution_steps"):
            if getattr(self, name) < 1:
                raise PolicyError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.control_hz > 0:
            raise PolicyError(f"control_hz must be positive, got {self.control_hz:g}")
        if self.observation_steps - 1 + self.execution_steps > self.prediction_steps:
            raise PolicyError(
                f"observation_steps - 1 + execution_steps must not exceed prediction_steps, got "
                f"{self.observation_steps} - 1 + {self.execution_steps} > {self.prediction_steps}"
            )
        self._check_discrete()

    @property
    def executed(self) -> slice:
        """The rows of a chunk that are executed."""
        first = self.observation_steps - 1
        return slice(first, first + self.execution_steps)

    def to_dict(self) -> dict[str, Any]:
        """Plain types only, for YAML and JSON."""
        data = {**asdict(self), "discrete": list(self.discrete)}
        # Last comes what no version lacks: of a file that is cut off it is missed.
        data["control_hz"] = data.pop("control_hz")
        for array in data["observations"].values():
            array["shape"] = list(array["shape"])
        return data

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> PolicySpec:
        """Inverse of `to_dict`."""
        observations = {key: ArraySpec(tuple(a["shape"]), a["dtype"]) for key, a in data["observations"].items()}
        # Specs of earlier versions name no discrete dimensions.
        discrete = tuple(data.get("discrete", ()))
        return PolicySpec(**{**data, "observations": observations, "discrete": discrete})

    def check(self, observations: Mapping[str, ArraySpec], action_dim: int, control_hz: float, other: str) -> None:
        """Refuse a task or robot named `other` that does not offer what this policy needs.

        Raises:
            PolicyError: naming both sides of the first mismatch.
        """
        for key, need in self.observations.items():
            if key not in observations:
                raise PolicyError(f"the policy needs observation '{key}', {other} offers {sorted(observations)}")
            if observations[key] != need:
                raise PolicyError(f"observation '{key}': the policy needs {need}, {other} offers {observations[key]}")
        if action_dim != self.action_dim:
            raise PolicyError(f"the policy has {self.action_dim} action dimensions, {other} has {action_dim}")
        if abs(control_hz - self.control_hz) > 1e-6 * self.control_hz:
            raise PolicyError(f"the policy runs at {self.control_hz:g} Hz, {other} at {control_hz:g} Hz")

    def _check_discrete(self) -> None:
        dims = self.discrete
        if len(set(dims)) < len(dims) or not set(dims) <= set(range(self.action_dim)):
            raise PolicyError(f"discrete={list(dims)} must name different dimensions from 0 to {self.action_dim - 1}")
        if not 0 < self.discrete_scale <= 1:
            raise PolicyError(f"discrete_scale must be in (0, 1], got {self.discrete_scale:g}")
