"""More demonstrations of Push-T out of those there are: mirror images, and goals put where the block was left."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from flowsteer.sim.tasks.base import Array, Arrays
from flowsteer.sim.tasks.pusht_state import BOARD, GOAL, recorded_state_keys


def mirrored(arrays: Arrays) -> Arrays:
    """The same episodes seen in a mirror along the goal's axis of symmetry, the line x + y = 512.

    The board, the goal and the T stay what they are: (x, y) becomes (512 - y, 512 - x), an angle pi/2 minus itself.

    Args:
        arrays: any of "agent_position" [N, 2], "block_pose" [N, 4], "agent_in_block" [N, 2], "near_goal" [N, 3],
            "image" [N, 96, 96, 3] and "action" [N, 2].
    """
    return {key: MIRRORED[key](array) for key, array in arrays.items()}


def _mirrored_position(xy: Array) -> Array:
    return BOARD - xy[..., ::-1]


def _mirrored_pose(pose: Array) -> Array:
    return np.concatenate([_mirrored_position(pose[..., :2]), pose[..., :1:-1]], axis=-1)


def _mirrored_in_block(xy: Array) -> Array:
    return np.stack([-xy[..., 0], xy[..., 1]], axis=-1)


def _mirrored_near_goal(error: Array) -> Array:
    return np.concatenate([-error[..., 1::-1], -error[..., 2:]], axis=-1)


def _mirrored_image(image: Array) -> Array:
    return np.swapaxes(image[..., ::-1, ::-1, :], -3, -2)


MIRRORED: dict[str, Callable[[Array], Array]] = {
    "agent_position": _mirrored_position,
    "block_pose": _mirrored_pose,
    "agent_in_block": _mirrored_in_block,
    "near_goal": _mirrored_near_goal,
    "image": _mirrored_image,
    "action": _mirrored_position,
}


def in_hindsight(arrays: Arrays, episode_ends: NDArray[np.int64]) -> Arrays:
    """The same episodes, each moved and turned so that the goal lies where the block came to lie.

    The goal that was reached stands in for the one that was meant (Andrychowicz et al. 2017): the human demonstrations
    stop at a coverage of 0.77 to 0.90, and what only learns from them never sees the last few pixels. The board's
    edges move along by that error, 5 pixels and 3 degrees.

    Args:
        arrays: "agent_position" [N, 2], "block_pose" [N, 4] and "action" [N, 2], and any of "agent_in_block" [N, 2] and
            "near_goal" [N, 3].
        episode_ends: index after the last frame of each episode [E].
    """
    pose = arrays["block_pose"]
    angle = np.arctan2(pose[:, 3], pose[:, 2])
    last = np.repeat(episode_ends - 1, np.diff(episode_ends, prepend=0))
    pivot, turn = pose[last, :2], GOAL[2] - angle[last]

    def moved(xy: Array) -> Array:
        out: Array = _turned(xy - pivot, turn) + np.array(GOAL[:2])
        return out

    state = np.column_stack([moved(arrays["agent_position"]), moved(pose[:, :2]), angle + turn])
    seen = {key: stored.read(state) for key, stored in recorded_state_keys().items() if stored.read is not None}
    return {**{key: seen[key] for key in arrays if key in seen}, "action": moved(arrays["action"])}


def _turned(xy: Array, angle: Array) -> Array:
    cos, sin = np.cos(angle), np.sin(angle)
    return np.stack([cos * xy[..., 0] - sin * xy[..., 1], sin * xy[..., 0] + cos * xy[..., 1]], axis=-1)
