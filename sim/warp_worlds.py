"""N worlds of one model in MuJoCo Warp, whose state Torch reads and writes in place.

Dimension letters: N worlds, nq / nv / nu MuJoCo's positions, velocities, controls. Importing this needs Warp.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, final

import mujoco
import mujoco_warp
import torch
import warp as wp
from torch import Tensor

from flowsteer.sim.errors import SimError
from flowsteer.sim.start_queue import Start
from flowsteer.sim.tasks.mujoco_task import MujocoTask
from flowsteer.sim.warp_fields import WorldFields

Geom = mujoco.mjtGeom
MOST_CONTACTS = {Geom.mjGEOM_PLANE: 4, Geom.mjGEOM_SPHERE: 1, Geom.mjGEOM_ELLIPSOID: 1, Geom.mjGEOM_CAPSULE: 2}
"""Of a geom with another, whichever of the two has fewer; others have up to 8, as two boxes."""
MOST_CONTACTS_OF_A_WORLD = 256
MOST_CONSTRAINTS_OF_A_WORLD = 1024
"""Unless the model's `<size nconmax="..." njmax="..."/>` says otherwise."""


@final
class WarpWorlds:
    """`num_worlds` worlds of `task` on `device`, in float32.

    On a GPU, steps are recorded once as a CUDA graph and replayed on Torch's current stream; where the driver has no
    memory pools, and on a CPU, kernels are launched one by one. The contact buffer is shared by all worlds, the
    constraint buffer is each world's own. Both have room for all that the model's geoms and joints can make, up to
    `MOST_..._OF_A_WORLD`.

    Attributes:
        qpos, qvel, ctrl, sensors: views [N, nq], [N, nv], [N, nu], [N, nsensordata] of Warp's arrays.
        fields: what `task.randomize` changes.

    Raises:
        SimError: the model has a feature that MuJoCo Warp lacks, a field cannot be randomised there, the device is
            none of Warp's, or memory is short.
    """

    def __init__(self, task: MujocoTask, num_worlds: int, device: torch.device) -> None:
        self._task, self._device, self.num_worlds = task, device, num_worlds
        wp.config.quiet = True
        host = task.model()
        # Warp never resets a world by itself, and refuses the flag that says so.
        host.opt.disableflags &= ~int(mujoco.mjtDisableBit.mjDSBL_AUTORESET)
        self._warp = _warp_device(task, device)
        with self.enough_memory(), wp.ScopedDevice(self._warp):
            self._model = _put_model(task, host)
            # Where a graph cannot loop, the solver makes all of its iterations; a CPU needs no graph.
            self._model.opt.graph_conditional = not self._warp.is_cuda or wp.is_conditional_graph_supported()
            contacts, constraints, pairs = _sizes(host, self._model)
            self._data = mujoco_warp.make_data(
                host,
                nworld=num_worlds,
                nconmax=contacts,
                njmax=constraints,
                njmax_nnz=constraints * host.nv,
                nccdmax=min(pairs, contacts),
            )
            # Before anything is recorded, as graphs keep the addresses of the arrays.
            self.fields = WorldFields(task, host, self._model, self._data, num_worlds)
            self._most_constraints = wp.zeros(num_worlds, dtype=int)
            self._most_contacts = wp.zeros(1, dtype=int)
            # Called wherever forces are computed, so at each of an integrator's stages.
            self._model.callback.control = self._watch
            self._views()
            self._advance = self._recorded(self._physics_steps)
            self._sense = self._recorded(lambda: mujoco_warp.forward(self._model, self._data))

    def step(self) -> None:
        """One control step under `ctrl`."""
        self._advance()

    def sense(self) -> None:
        """Bring `sensors` up to date with `qpos` and `qvel`."""
        self._sense()

    def restart(self, worlds: Tensor, start: Start) -> None:
        """Begin `start` [N] in the worlds of the mask [N], with no trace of what they did before."""
        mask = worlds[:, None]
        self.qpos.copy_(torch.where(mask, start.qpos, self.qpos))
        self.qvel.copy_(torch.where(mask, start.qvel, self.qvel))
        self.fields.write(worlds, start.fields)
        for view in self._traces:
            view.masked_fill_(worlds.view(-1, *(1,) * (view.ndim - 1)), 0)

    def forget_overflow(self) -> None:
        """Begin to watch the buffers anew."""
        self._constraints.zero_()
        self._contacts.zero_()

    def overflown(self) -> Tensor:
        """[N] bool: contacts or constraints of that world may have been dropped since `forget_overflow`.

        What the shared buffer drops may be any world's.
        """
        too_many: Tensor = (self._constraints > self._data.njmax) | (self._contacts > self._data.naconmax)
        return too_many

    def needs(self) -> Tensor:
        """[2] the most contacts of all worlds, and the most constraints of one, since `forget_overflow`."""
        return torch.cat([self._contacts, self._constraints.amax(0, keepdim=True)])

    def complaints(self, contacts: int, constraints: int) -> list[str]:
        """What to tell a user whose worlds needed as much."""
        name, lost, found = self._task.spec.name, "the episodes that met it are lost", []
        if contacts > self._data.naconmax:
            each = math.ceil(contacts / self.num_worlds)
            found.append(
                f"{name}: {self.num_worlds} worlds had at least {contacts} contacts, {self._data.naconmax} fit; {lost}:"
                f' put <size nconmax="{each}"/> or more into its model'
            )
        if constraints > self._data.njmax:
            found.append(
                f"{name}: a world had {constraints} constraints, {self._data.njmax} fit; {lost}:"
                f' put <size njmax="{constraints}"/> or more into its model'
            )
        return found

    def memory_bytes(self) -> int:
        """Of the state of all worlds."""
        return sum(_bytes(part) for part in (self._data, self._data.contact, self._data.efc))

    def close(self) -> None:
        """Free the memory; nothing else may be called afterwards."""
        self._advance = self._sense = _nothing
        self._model = self._data = None
        self.qpos = self.qvel = self.ctrl = self.sensors = self._constraints = self._contacts = torch.empty(0)
        self._traces.clear()
        self.fields.close()

    @contextmanager
    def enough_memory(self) -> Iterator[None]:
        """Turn the errors of Torch and Warp that mean a full memory into one that names the remedy."""
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            if isinstance(error, SimError) or not any(sign in str(error).lower() for sign in ("allocat", "of memory")):
                raise
            raise SimError(
                f"{self._task.spec.name}: {self.num_worlds} worlds do not fit into the memory of {self._device} "
                f"({' '.join(str(error).split())[:100]}): take fewer with sim.num_envs"
            ) from error

    def _views(self) -> None:
        data = self._data
        self.qpos, self.qvel, self.ctrl, self.sensors = (
            wp.to_torch(array) for array in (data.qpos, data.qvel, data.ctrl, data.sensordata)
        )
        self._constraints, self._contacts = wp.to_torch(self._most_constraints), wp.to_torch(self._most_contacts)
        # The solver multiplies rows of the Jacobian that are not in use by zero, which a NaN survives.
        arrays = (data.time, data.ctrl, data.act, data.act_dot, data.qacc_warmstart, data.qacc, data.efc.J)
        self._traces: list[Tensor] = [wp.to_torch(array) for array in arrays if array.size]

    def _physics_steps(self) -> None:
        for _ in range(self._task.frame_skip):
            mujoco_warp.step(self._model, self._data)

    def _watch(self, model: Any, data: Any) -> None:
        wp.launch(
            WATCH,
            dim=self.num_worlds,
            inputs=[data.njmax, data.naconmax],
            outputs=[data.nefc, data.nacon, data.ncollision, self._most_constraints, self._most_contacts],
        )

    def _recorded(self, launch: Callable[[], None]) -> Callable[[], None]:
        """`launch` as a graph on Torch's stream, where the device has graphs that may allocate."""
        device = self._warp
        if not device.is_cuda:
            return _on(device, launch)
        if not wp.is_mempool_enabled(device):
            return lambda: self._on_stream(launch)
        launch()  # Loads the kernels, which cannot be done while a graph is recorded.
        wp.synchronize_device(device)
        with wp.ScopedCapture(device=device) as capture:
            launch()
        wp.synchronize_device(device)
        return lambda: wp.capture_launch(capture.graph, stream=wp.stream_from_torch(self._device))

    def _on_stream(self, launch: Callable[[], None]) -> None:
        with wp.ScopedStream(wp.stream_from_torch(self._device)):
            launch()


def _watch(
    njmax: int,
    naconmax: int,
    nefc: wp.array[int],
    nacon: wp.array[int],
    ncollision: wp.array[int],
    most_constraints: wp.array[int],
    most_contacts: wp.array[int],
) -> None:
    world = wp.tid()
    most_constraints[world] = wp.max(most_constraints[world], nefc[world])
    nefc[world] = wp.min(nefc[world], njmax)
    if world == 0:
        most_contacts[0] = wp.max(most_contacts[0], wp.max(nacon[0], ncollision[0]))
        nacon[0] = wp.min(nacon[0], naconmax)
        ncollision[0] = wp.min(ncollision[0], naconmax)


WATCH = wp.kernel(_watch, enable_backward=False)
"""Keeps the largest counts of constraints per world and of contacts, or of pairs that may touch, in all worlds.

It cuts them to what is in the buffers, or Warp would print a line per world and physics step.
"""


def _warp_device(task: MujocoTask, device: torch.device) -> Any:
    wp.init()
    try:
        return wp.get_device(str(wp.device_from_torch(device)))
    except (RuntimeError, ValueError, AssertionError, IndexError) as error:
        raise SimError(f"{task.spec.name}: MuJoCo Warp has no device '{device}' here: choose cpu") from error


def _put_model(task: MujocoTask, host: Any) -> Any:
    if (host.geom_type == Geom.mjGEOM_HFIELD).any():
        raise SimError(
            f"{task.spec.name}: MuJoCo Warp drops contacts with height fields unnoticed: choose sim.backend=threads"
        )
    try:
        with warnings.catch_warnings():
            # Old drivers: told once here by what follows from it, a slower step.
            warnings.filterwarnings("ignore", message=r"\s*CUDA version < 12.4 detected")
            return mujoco_warp.put_model(host)
    except (NotImplementedError, ValueError) as error:
        raise SimError(
            f"{task.spec.name}: MuJoCo Warp lacks what its model needs ({' '.join(str(error).split())}): "
            "choose sim.backend=threads"
        ) from error


def _sizes(host: Any, model: Any) -> tuple[int, int, int]:
    """Contacts and constraints to make room for, and pairs of geoms that can touch, of one world."""
    pairs = model.nxn_geom_pair_filtered.numpy().tolist()
    kinds = host.geom_type.tolist()
    contacts = sum(min(MOST_CONTACTS.get(Geom(kinds[geom]), 8) for geom in pair) for pair in pairs)
    contacts = host.nconmax if host.nconmax >= 0 else min(contacts, MOST_CONTACTS_OF_A_WORLD)
    condim = int(max([1, *host.geom_condim, *host.pair_dim]))
    pyramidal = host.opt.cone == mujoco.mjtCone.mjCONE_PYRAMIDAL
    rows = 2 * (condim - 1) if pyramidal and condim > 1 else condim
    others = (
        6 * host.neq
        + 2 * int(host.jnt_limited.sum() + host.tendon_limited.sum())
        + int((host.dof_frictionloss > 0).sum() + (host.tendon_frictionloss > 0).sum())
    )
    constraints = min(rows * contacts + others, MOST_CONSTRAINTS_OF_A_WORLD)
    return contacts, max(1, host.njmax if host.njmax >= 0 else constraints), len(pairs)


def _on(device: Any, launch: Callable[[], None]) -> Callable[[], None]:
    def on_device() -> None:
        with wp.ScopedDevice(device):
            launch()

    return on_device


def _nothing() -> None:
    pass


def _bytes(part: Any) -> int:
    return sum(value.capacity for value in vars(part).values() if isinstance(value, wp.array))
