"""A hopper with another model."""

import os

from flowsteer.sim.tasks.locomotion import Hopper
from flowsteer.sim.tasks.mujoco_task import MujocoTask

HOPPER = Hopper()


class Like(MujocoTask):
    """A hopper whose model `change` has changed."""

    spec, dataset_keys = Hopper.spec, Hopper.dataset_keys
    frame_skip = Hopper.frame_skip

    draw, initial, control, observe, judge = (
        staticmethod(method) for method in (HOPPER.draw, HOPPER.initial, HOPPER.control, HOPPER.observe, HOPPER.judge)
    )

    def __init__(self, change, randomize=None):
        super().__init__(randomize)
        self._change = change

    def load(self):
        import mujoco
        from gymnasium.envs import mujoco as assets

        spec = mujoco.MjSpec.from_file(os.path.join(os.path.dirname(assets.__file__), "assets", "hopper.xml"))
        self._change(spec)
        return spec.compile()


def with_memory(size, spec):
    """So many bytes for contacts and constraints."""
    spec.memory = size
