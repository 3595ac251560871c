from __future__ import annotations

import subprocess
import sys
from itertools import chain, islice

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flowsteer.datasets import Batches, DataError, Windows, epoch_batches

SIZES = {"observation_steps": 1, "prediction_steps": 1, "execution_steps": 1}


@pytest.fixture
def windows(make_buffer):
    """30 windows; the observation of window n is (n, -n)."""
    return Windows(make_buffer((10, 20)), ["state"], **SIZES)


def numbers(batch):
    return batch["obs"]["state"][:, 0, 0].int().tolist()


def take(batches, count):
    return [numbers(batch) for batch in islice(batches, count)]


def test_an_epoch_visits_windows_at_most_once_and_drops_the_rest(windows):
    batches = Batches(windows, 8, seed=1)
    assert batches.batches_per_epoch == 3
    epochs = [list(chain(*take(batches, 3))) for _ in range(4)]
    assert all(len(set(epoch)) == 24 for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert set().union(*epochs) == set(range(30))


def test_the_order_depends_on_the_seed_alone(windows):
    assert take(Batches(windows, 8, seed=3), 7) == take(Batches(windows, 8, seed=3, prefetch=2), 7)
    assert take(Batches(windows, 8, seed=3), 3) != take(Batches(windows, 8, seed=4), 3)


def test_seed_and_epoch_do_not_mix(windows):
    second_epoch = take(Batches(windows, 10, seed=0), 6)[3:]
    assert second_epoch != take(Batches(windows, 10, seed=1), 3)


@pytest.mark.parametrize("prefetch", [0, 1, 3])
@pytest.mark.parametrize("done", [0, 1, 2, 3, 7])
def test_a_resumed_iterator_continues_exactly(windows, prefetch, done):
    expected = take(Batches(windows, 8, seed=5), 12)
    first = Batches(windows, 8, seed=5, prefetch=prefetch)
    assert take(first, done) == expected[:done]
    state = first.state_dict()
    assert all(isinstance(value, int) for value in state.values())
    first.close()
    second = Batches(windows, 8, seed=5, prefetch=prefetch)
    take(second, 2)  # whatever it did before
    second.load_state_dict(state)
    assert take(second, 12 - done) == expected[done:]
    second.close()


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_the_global_batch_is_the_same_whatever_the_world_size(windows, world_size):
    expected = take(Batches(windows, 8, seed=2), 5)
    ranks = [take(Batches(windows, 8, seed=2, rank=rank, world_size=world_size), 5) for rank in range(world_size)]
    assert [list(chain(*parts)) for parts in zip(*ranks, strict=True)] == expected


@settings(deadline=None)
@given(st.integers(1, 100))
def test_any_batch_size_gives_full_batches(batch_size):
    import numpy as np

    from flowsteer.datasets import ReplayBuffer

    frames = np.arange(7, dtype=np.float32)[:, None]
    windows = Windows(ReplayBuffer({"state": frames, "action": frames}, np.array([7])), ["state"], **SIZES)
    for batch in take(Batches(windows, batch_size), 3):
        assert len(batch) == batch_size
        counts = [batch.count(n) for n in range(7)]
        assert max(counts) - min(counts) <= 1


def test_an_error_in_the_background_reaches_the_caller(windows, monkeypatch):
    batches = Batches(windows, 8, prefetch=2)
    monkeypatch.setattr(windows, "gather", lambda indices: (_ for _ in ()).throw(DataError("broken chunk")))
    with pytest.raises(DataError, match="broken chunk"):
        next(batches)
    batches.close()
    batches.close()


def test_a_foreign_state_is_refused_and_changes_nothing(windows):
    batches = Batches(windows, 8, seed=5)
    take(batches, 2)
    before = batches.state_dict()
    with pytest.raises(DataError, match="'seed' was 6 and is 5"):
        batches.load_state_dict({**before, "seed": 6, "offset": 0})
    with pytest.raises(DataError, match="'windows' was 29 and is 30"):
        batches.load_state_dict({**before, "windows": 29})
    assert batches.state_dict() == before


@pytest.mark.parametrize(
    "options", [{"batch_size": 0}, {"batch_size": 9, "world_size": 2}, {"batch_size": 8, "rank": 1}]
)
def test_impossible_sizes_are_refused(windows, options):
    with pytest.raises(DataError, match="must be a multiple of world_size"):
        Batches(windows, **options)


def test_epoch_batches_pass_once_in_order(windows):
    assert [numbers(batch) for batch in epoch_batches(windows, 12)] == [
        list(range(12)),
        list(range(12, 24)),
        list(range(24, 30)),
    ]


def test_prefetch_does_not_hold_up_the_end_of_the_program():
    program = """
import numpy as np
from flowsteer.datasets import Batches, ReplayBuffer, Windows
frames = np.zeros((50, 1), np.float32)
windows = Windows(ReplayBuffer({"s": frames, "action": frames}, np.array([50])), ["s"],
                  observation_steps=1, prediction_steps=1, execution_steps=1)
batches = Batches(windows, 4, prefetch=8)
next(batches)
print("done")
"""
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert finished.stdout == "done\n"
    assert finished.stderr == ""


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_batches_for_a_gpu_are_page_locked(windows):
    batches = Batches(windows, 8, seed=1, pin_memory=True)
    locked = list(islice(batches, 4))
    assert all(batch["action"].is_pinned() and batch["obs"]["state"].is_pinned() for batch in locked)
    assert [numbers(batch) for batch in locked] == take(Batches(windows, 8, seed=1), 4)
    batches.close()
