"""What Push-T's state shows: finger x, y, block x, y in pixels and the block's angle in radians, [..., 5]."""

from __future__ import annotations

import math

import numpy as np

from flowsteer.sim.tasks.base import Array, DatasetKey

BOARD = 512
"""Side of the board in pixels; agent, block and actions live in [0, BOARD]."""
GOAL = (256.0, 256.0, math.pi / 4)
"""Of the block: x, y in pixels, angle in radians."""

# The nine block key points of the human demonstrations, in the block's frame. Their authors drew them at random inside
# the block once; the table is the mean of R(-angle) (keypoint - position) over the 13,379 recorded frames in which the
# block rests (standard deviation 0.001 px).
BLOCK_KEYPOINTS = np.array(
    [
        [9.269793, 90.040966],
        [-60.983476, -1.186729],
        [60.912752, -1.393378],
        [-0.270504, 25.543618],
        [-14.064917, 122.815848],
        [39.002738, 32.857393],
        [-39.966414, 32.729653],
        [-16.824341, 62.863174],
        [23.541457, -1.700298],
    ]
)


def agent_in_block(state: Array) -> Array:
    """The finger's x, y [..., 2] in the block's frame, in pixels, where contact looks the same however the block lies.

    Args:
        state: finger x, y, block x, y, angle [..., 5].
    """
    cos, sin = np.cos(state[..., 4]), np.sin(state[..., 4])
    dx, dy = state[..., 0] - state[..., 2], state[..., 1] - state[..., 3]
    return np.stack([cos * dx + sin * dy, cos * dy - sin * dx], axis=-1).astype(np.float32)


def near_goal(state: Array) -> Array:
    """Tanh of the block's x, y (in 30 pixels) and angle (in 0.3 rad) from the goal [..., 3]: fine near, flat far off.

    Args:
        state: finger x, y, block x, y, angle [..., 5].
    """
    turned = (state[..., 4] - GOAL[2] + math.pi) % (2 * math.pi) - math.pi
    away = [(state[..., 2] - GOAL[0]) / 30, (state[..., 3] - GOAL[1]) / 30, turned / 0.3]
    return np.tanh(np.stack(away, axis=-1)).astype(np.float32)


def continuous_pose(pose: Array) -> Array:
    """Poses x, y, angle [..., 3] as x, y, cos, sin [..., 4]: an angle jumps where it wraps, and a network with it."""
    turned = np.stack([np.cos(pose[..., 2]), np.sin(pose[..., 2])], axis=-1)
    return np.concatenate([pose[..., :2], turned], axis=-1).astype(np.float32)


def _recorded_agent(state: Array) -> Array:
    return state[..., 0:2]


def _recorded_block(state: Array) -> Array:
    return continuous_pose(state[..., 2:5])


def recorded_state_keys() -> dict[str, DatasetKey]:
    """What the human demonstrations keep in one array, `state`: finger x, y, block x, y, angle."""
    return {
        "agent_position": DatasetKey("state", _recorded_agent),
        "block_pose": DatasetKey("state", _recorded_block),
        "agent_in_block": DatasetKey("state", agent_in_block),
        "near_goal": DatasetKey("state", near_goal),
    }
