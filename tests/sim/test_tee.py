"""Coverage of the T against hand computation and against shapely."""

import math

import numpy as np
import pytest
import torch

from flowsteer.sim.tasks.tee import AREA, RECTANGLES, coverage

GOAL = (256.0, 256.0, math.pi / 4)


def covered(xp, poses):
    poses = xp.asarray(poses)
    return coverage(xp, poses[..., 0], poses[..., 1], xp.cos(poses[..., 2]), xp.sin(poses[..., 2]), GOAL)


def test_by_hand():
    # Moved by 30 along the bar, the stem leaves its place and the bar keeps 90 of its 120.
    along = 30 / math.sqrt(2)
    poses = np.array(
        [GOAL, (256 + along, 256 + along, math.pi / 4), (0.0, 0.0, 0.0), (256.0, 256.0, math.pi / 4 + 2 * math.pi)]
    )
    assert AREA == 6300
    np.testing.assert_allclose(covered(np, poses), [1, 2700 / 6300, 0, 1], atol=1e-5)


@pytest.mark.parametrize("angle", [0.0, math.pi / 2, math.pi, -math.pi / 2])
def test_edges_along_each_other_count_once(angle):
    # A quarter turn about the origin leaves 30 x 30 of bar on bar and twice 30 x 15 of bar on stem.
    assert covered(np, np.array([256.0, 256.0, math.pi / 4 + angle])) == pytest.approx(
        {0.0: 1.0, math.pi / 2: 1800 / 6300, math.pi: 0.0, -math.pi / 2: 1800 / 6300}[angle], abs=1e-5
    )


def test_as_shapely_for_any_pose():
    shapely = pytest.importorskip("shapely")
    rng = np.random.default_rng(0)
    poses = np.concatenate(
        [rng.uniform((100, 100, -4), (400, 400, 4), (300, 3)), np.array(GOAL) + rng.normal(0, (5, 5, 0.1), (300, 3))]
    )

    def tee(x, y, angle):
        c, s = math.cos(angle), math.sin(angle)
        corners = [np.array([(x0, y0), (x1, y0), (x1, y1), (x0, y1)]) for x0, x1, y0, y1 in RECTANGLES.tolist()]
        return shapely.union_all([shapely.Polygon(p @ np.array([[c, s], [-s, c]]) + (x, y)) for p in corners])

    goal = tee(*GOAL)
    expected = [goal.intersection(tee(*pose)).area / AREA for pose in poses]
    found = covered(np, poses.reshape(60, 10, 3))
    np.testing.assert_allclose(found.ravel(), expected, atol=1e-5)
    np.testing.assert_allclose(covered(torch, torch.from_numpy(poses)).numpy(), expected, atol=1e-5)
    assert covered(torch, torch.from_numpy(poses).float()).numpy() == pytest.approx(expected, abs=2e-5)
