"""Every task by its name. Tasks with choices appear once per choice that changes what they observe."""

from __future__ import annotations

from collections.abc import Callable

from flowsteer.sim.tasks.base import Task
from flowsteer.sim.tasks.gymnasium_robotics import AdroitDoor, Kitchen
from flowsteer.sim.tasks.locomotion import HalfCheetah, Hopper, Walker2d
from flowsteer.sim.tasks.pusht import PushT

TASKS: dict[str, Callable[[], Task]] = {
    "pusht": PushT,
    "pusht_keypoints": lambda: PushT("keypoints"),
    "pusht_image": lambda: PushT("image"),
    "hopper": Hopper,
    "walker2d": Walker2d,
    "halfcheetah": HalfCheetah,
    "kitchen": Kitchen,
    "adroit_door": AdroitDoor,
}
