"""Options of `flowsteer demo`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class DemoConfig:
    """A robot arm that learns to lift a cube.

    Attributes:
        demonstrations: episodes of the scripted expert.
        steps: optimiser steps.
        episodes: judged ones, from seeds that nobody has seen.
        videos: of how many of them.
        seed: of everything else.
        out: the folder; runs/demo when not given. What is there already is not done again.
    """

    demonstrations: int = 200
    steps: int = 3000
    episodes: int = 50
    videos: int = 3
    seed: int = 0
    out: str | None = None
