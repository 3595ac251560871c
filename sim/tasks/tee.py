"""The T of Push-T: its outline, and how much of one T another covers, for whole batches.

Lengths are in pixels of gym-pusht's board. The T is two rectangles that share an edge; its origin is the middle of the
bar's outer edge.
"""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

RECTANGLES = np.array([[-60.0, 60.0, 0.0, 30.0], [-15.0, 15.0, 30.0, 120.0]])
"""Bar and stem as x low, x high, y low, y high in the T's frame."""
AREA = 6300.0
GROWTH = 1e-4
"""By so much, in pixels, the block is larger than it is, so that its edges never lie exactly on the goal's, where they
would count twice. The coverage gains 5e-6 at most."""
GROWN = RECTANGLES + GROWTH * np.array([-1, 1, -1, 1])


def coverage(xp: ModuleType, x: Any, y: Any, cos: Any, sin: Any, goal: tuple[float, float, float]) -> Any:
    """Share of the T at `goal` (x, y, angle) that the T at x, y and cos, sin of its angle covers, each [...].

    By Green's theorem: the boundary of what two rectangles share is the part of each one's outline inside the other.
    """
    # The block in the goal's frame, with an axis for the corners.
    c, s = math.cos(goal[2]), math.sin(goal[2])
    dx, dy = x - goal[0], y - goal[1]
    x, y = (c * dx + s * dy)[..., None], (c * dy - s * dx)[..., None]
    cos, sin = (c * cos + s * sin)[..., None], (c * sin - s * cos)[..., None]
    u, v = (xp.asarray(corners, dtype=x.dtype, device=x.device) for corners in _corners(RECTANGLES))
    goal_in_block = cos * (u - x) + sin * (v - y), cos * (v - y) - sin * (u - x)
    u, v = (xp.asarray(corners, dtype=x.dtype, device=x.device) for corners in _corners(GROWN))
    block_in_goal = cos * u - sin * v + x, sin * u + cos * v + y
    # Both integrals must be about the same point: the block's origin.
    shared = _inside(xp, *goal_in_block, GROWN, (0.0, 0.0)) + _inside(xp, *block_in_goal, RECTANGLES, (x, y))
    return xp.clip(shared / AREA, 0.0, 1.0)


def _corners(rectangles: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """x and y of the corners of both rectangles, counter-clockwise, [8]."""
    return rectangles[:, [0, 1, 1, 0]].ravel(), rectangles[:, [2, 2, 3, 3]].ravel()


NEXT = [1, 2, 3, 0, 5, 6, 7, 4]


def _inside(xp: ModuleType, px: Any, py: Any, rectangles: NDArray[np.float64], origin: tuple[Any, Any]) -> Any:
    """Half the sum of p x q, taken from `origin`, over the parts p -> q of the edges inside each of `rectangles`.

    px, py: the corners [..., 8] of two outlines. Edges are cut as by Liang and Barsky (1984).
    """
    dx, dy = px[..., NEXT] - px, py[..., NEXT] - py
    twice = (px - origin[0]) * dy - (py - origin[1]) * dx
    total = 0.0
    for x0, x1, y0, y1 in rectangles.tolist():
        enter_x, leave_x = _slab(xp, px, dx, x0, x1)
        enter_y, leave_y = _slab(xp, py, dy, y0, y1)
        enter = xp.clip(xp.maximum(enter_x, enter_y), 0.0, 1.0)
        leave = xp.clip(xp.minimum(leave_x, leave_y), 0.0, 1.0)
        # (p + t d) x (p + u d) = (u - t) p x d.
        total = total + 0.5 * xp.sum(xp.clip(leave - enter, 0.0, 1.0) * twice, axis=-1)
    return total


def _slab(xp: ModuleType, p: Any, d: Any, low: float, high: float) -> tuple[Any, Any]:
    """The interval of t in which p + t d lies between low and high."""
    # An edge along the slab is inside for all t or for none: the tiny slope puts the crossings far away.
    slope = xp.where(xp.abs(d) < 1e-12, xp.full_like(d, 1e-12), d)
    one, other = (low - p) / slope, (high - p) / slope
    return xp.minimum(one, other), xp.maximum(one, other)
