"""Options of `flowsteer data collect`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from hydra_zen import builds

from flowsteer.configs.simulation import SimOptions
from flowsteer.sim.collect import ActionNoise

NoiseOptions: Any = builds(ActionNoise, populate_full_signature=True)


@dataclass
class CollectConfig:
    """Which episodes to keep.

    Attributes:
        task: where; the checkpoint's when not given.
        checkpoint: roll this policy instead of the task's scripted expert.
        episodes: how many to keep of a scripted expert; how many to try with a checkpoint.
        seed: of the first episode; the others follow.
        noise: on the scripted expert's actions.
        record_clean: keep what the scripted expert wanted, not what the noise made of it.
        only_successful: leave out failed episodes.
        format: "zarr" or "hdf5" (robomimic's).
        device: where a checkpoint's policy runs, "auto" (a GPU where there is one) or "cpu".
        out: the folder; data/TASK-EPISODES when not given.
    """

    task: str | None = None
    checkpoint: str | None = None
    episodes: int = 200
    seed: int = 0
    noise: NoiseOptions = field(default_factory=NoiseOptions)
    record_clean: bool = True
    only_successful: bool = True
    format: str = "zarr"
    device: str = "auto"
    out: str | None = None
    sim: SimOptions = field(default_factory=SimOptions)
