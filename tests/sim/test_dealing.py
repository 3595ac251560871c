import numpy as np
import pytest

from flowsteer.sim.dealing import Dealing
from flowsteer.sim.errors import SimError


def dealt(num_envs, workers, close=lambda: None):
    return Dealing(num_envs, workers, "task: the worker", "give up", close)


def row(steps):
    return (2.0, 1.0, steps, True, False, False)


def test_environments_are_dealt_in_turn_and_no_worker_is_left_without():
    assert dealt(5, 2).indices == [(0, 2, 4), (1, 3)]
    assert dealt(2, 9).indices == [(0,), (1,)]


def test_only_workers_with_work_get_a_part():
    assert dealt(5, 3).parts({4: "x", 1: "y", 0: "z"}) == {0: [0], 1: [1, 4]}


def test_outcomes_come_in_the_order_asked_and_what_nobody_tells_is_lost():
    outcomes, lost = dealt(5, 2).collect([4, 1, 0, 3], {0: ([row(10), row(14)], {0})})
    assert outcomes["env_steps"].tolist() == [14, 0, 10, 0]
    assert lost == {0, 1, 3}
    outcomes, lost = dealt(2, 2).collect([0, 1], {1: (np.array([row(3)], dtype=outcomes.dtype), set())})
    assert (outcomes["env_steps"].tolist(), lost) == ([0, 3], {0})


def test_a_worker_that_keeps_dying_ends_the_pool_but_a_chunk_in_between_forgives():
    closed = []
    dealing = dealt(4, 2, lambda: closed.append(True))
    told = r"task: the worker of environments \[1, 3\] died \(why\)"
    for _ in range(2):
        with pytest.warns(RuntimeWarning, match=told + "; their episodes are lost and a new worker takes over"):
            dealing.bury(1, "died (why)")
    dealing.collect([1], {1: ([row(1)], set())})
    for _ in range(2):
        with pytest.warns(RuntimeWarning, match=told):
            dealing.bury(1, "died (why)")
    assert not closed
    with pytest.raises(SimError, match=told + ", 3 times in a row: give up"):
        dealing.bury(1, "died (why)")
    assert closed
