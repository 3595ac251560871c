"""Domain randomisation: fields of a MuJoCo model scaled anew for each world and episode, from the seed."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from copy import copy
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from flowsteer.sim.errors import SimError, optional_module

STREAM = 1
"""Apart from the random numbers that the start of an episode takes from the same seed."""
BOUNDED = frozenset(
    {"geom_size", "geom_margin", "geom_rbound", "geom_aabb", "body_margin", "mesh_vert", "hfield_size", "hfield_data"}
)
"""The compiler alone makes bounding volumes fit sizes and margins: contacts outside of them would be missed."""
UNIT = ("quat", "jnt_axis", "light_dir", "eq_data")
"""Ends of names of fields with vectors of length 1, among them those of welds: MuJoCo does not normalise them again."""


@final
class Randomization:
    """Multiplies fields of `model` (mujoco.MjModel) by factors.

    Args:
        model: whose values are the nominal ones.
        ranges: {field: (low, high)}: a factor for each row of the field (each body, geom, joint, actuator), uniform
            between low and high; as `{"body_mass": (0.8, 1.2), "geom_friction": (0.5, 1.5)}`.

    Raises:
        SimError: a field is not one of the model's floating arrays, it follows from others, others that MuJoCo does
            not compute anew follow from it, its vectors must keep their length, or a range is not one.
    """

    def __init__(self, model: Any, ranges: Mapping[str, Sequence[float]]) -> None:
        self._ranges = {name: _range(name, values) for name, values in ranges.items()}
        self._nominal = {name: _field(model, name).copy() for name in ranges}
        if ranges:
            self._mujoco = optional_module("mujoco", "mujoco")
            self._refuse_computed(model)

    def factors(self, seed: int) -> dict[str, NDArray[np.float64]]:
        """{field: [rows]} of the episode `seed`."""
        rng = np.random.default_rng([STREAM, seed])
        return {name: rng.uniform(*self._ranges[name], len(field)) for name, field in self._nominal.items()}

    def apply(self, model: Any, data: Any, seed: int) -> None:
        """Give `model`, nominal or not, the values of the episode `seed`; `data` is a MjData that may be spoiled."""
        if not self._nominal:
            return
        for name, factors in self.factors(seed).items():
            nominal = self._nominal[name]
            getattr(model, name)[:] = nominal * factors.reshape(-1, *(1,) * (nominal.ndim - 1))
        # The tree of bounding volumes is the compiler's, and misses contacts where a geom or an inertia has moved.
        model.opt.disableflags |= self._mujoco.mjtDisableBit.mjDSBL_MIDPHASE
        # Inverse masses and the like are computed from what has changed.
        self._mujoco.mj_setConst(model, data)

    def _refuse_computed(self, model: Any) -> None:
        probe = copy(model)
        for name, nominal in self._nominal.items():
            getattr(probe, name)[:] = 2 * nominal
        self._mujoco.mj_setConst(probe, self._mujoco.MjData(probe))
        for name, nominal in self._nominal.items():
            if not np.array_equal(getattr(probe, name), 2 * nominal):
                raise SimError(f"randomize.{name} is computed from other fields of the model: scale those")


def _range(name: str, values: Sequence[float]) -> tuple[float, float]:
    if len(values) != 2 or not 0 <= values[0] <= values[1] < float("inf"):
        raise SimError(f"randomize.{name} must be two factors, 0 <= low <= high, got {list(values)}")
    return float(values[0]), float(values[1])


def _field(model: Any, name: str) -> NDArray[np.float64]:
    if name in BOUNDED:
        raise SimError(
            f"randomize.{name} would leave MuJoCo's bounding volumes behind: change sizes in the model's file"
        )
    if name.endswith(UNIT):
        raise SimError(f"randomize.{name} holds directions of length 1, which no factor may change: leave it out")
    field = getattr(model, name, None)
    if isinstance(field, np.ndarray) and field.dtype.kind == "f" and len(field):
        return field
    known = [n for n in dir(model) if not n.startswith("_")]
    known = [
        n for n in known if isinstance(getattr(model, n, None), np.ndarray) and getattr(model, n).dtype.kind == "f"
    ]
    near = difflib.get_close_matches(name, known, 1, 0.4)
    raise SimError(
        f"randomize.{name} is no field of the model that can be scaled" + (f"; nearest: {near[0]}" if near else "")
    )
