import numpy as np
import pytest

from flowsteer.policies.spec import ArraySpec, PolicySpec
from flowsteer.sim.evaluate import Episode, Evaluation
from flowsteer.sim.seams import seam_sizes, seams
from flowsteer.sim.spec import TaskSpec

TASK = TaskSpec("drawing", {"x": ArraySpec((1,))}, 3, (0.0, -1.0, -1.0), (10.0, 1.0, 1.0), 10.0, 9)
ACTIONS = [[0.0, 0.0, 1.0], [1.0, 0.0, 1.0], [4.0, 0.4, -1.0], [5.0, 0.4, -1.0], [5.0, 0.4, 1.0]]


def evaluation(*decisions, delay_steps=0, discrete=(), lost=False):
    chunk = np.zeros((4, 3), dtype=np.float32)
    episode = Episode(0, lost=lost, decisions=[(step, chunk) for step in decisions])
    episode.actions = [np.array(action, dtype=np.float32) for action in ACTIONS]
    spec = PolicySpec(TASK.observations, 3, 1, 4, 2, 10.0, discrete=discrete)
    return Evaluation("drawing", [episode], spec, delay_steps, [], 1, 0.0)


def test_a_seam_is_between_the_last_action_of_a_chunk_and_the_first_of_the_next():
    np.testing.assert_allclose(seams(evaluation(0, 2, 4)), [[3, 0.4, -2], [0, 0, 2]], rtol=1e-6)
    # Decided at 0, 1 and 3, in effect at 0, 2 and 4.
    np.testing.assert_allclose(seams(evaluation(0, 1, 3, delay_steps=1)), [[3, 0.4, -2], [0, 0, 2]], rtol=1e-6)
    # The last chunk came too late.
    assert len(seams(evaluation(0, 4, delay_steps=1))) == 0


def test_sizes_leave_out_what_is_meant_to_jump():
    sizes = seam_sizes(evaluation(0, 2, 4, discrete=(2,)), TASK)
    assert sizes["seam"] == pytest.approx(np.hypot(3, 0.4) / 2)
    assert sizes["seam_p95"] == pytest.approx(0.95 * np.hypot(3, 0.4))
    # 3 of 10 is more than 0.4 of 2.
    assert sizes["seam_share"] == pytest.approx(0.3 / 2)
    assert sizes["seam_share_p95"] == pytest.approx(0.95 * 0.3)
    assert seam_sizes(evaluation(0, 2, 4), TASK)["seam_share"] == pytest.approx((1.0 + 1.0) / 2)


@pytest.mark.parametrize("none", [evaluation(0), evaluation(0, 2, 4, lost=True), evaluation(0, 2, discrete=(0, 1, 2))])
def test_without_a_seam_there_is_no_size(none):
    assert set(seam_sizes(none, TASK).values()) == {None}
