from __future__ import annotations

import numpy as np
import pytest
import torch
import zarr
from hypothesis import given
from hypothesis import strategies as st

from flowsteer.datasets import DataError, ReplayBuffer, Windows, open_dataset, write_zarr


def windows_by_hand(lengths, observation_steps, prediction_steps, execution_steps):
    """Diffusion Policy's SequenceSampler with pad_before To - 1 and pad_after Ta - 1, one window at a time."""
    found, episode_start = [], 0
    for length in lengths:
        first = -(observation_steps - 1)
        last = max(first, length - prediction_steps + execution_steps - 1)
        for start in range(first, last + 1):
            steps = [min(max(start + step, 0), length - 1) for step in range(prediction_steps)]
            found.append([episode_start + step for step in steps])
        episode_start += length
    return found


def test_the_windows_of_two_short_episodes(make_buffer):
    windows = Windows(make_buffer((4, 3)), ["state"], observation_steps=2, prediction_steps=4, execution_steps=2)
    # Episode of 4: starts -1, 0, 1 (4 - 4 + 2 - 1). Episode of 3 (frames 4, 5, 6): starts -1, 0.
    assert windows.indices.tolist() == [[0, 0, 1, 2], [0, 1, 2, 3], [1, 2, 3, 3], [4, 4, 5, 6], [4, 5, 6, 6]]
    assert len(windows) == 5


@given(
    st.lists(st.integers(1, 12), min_size=1, max_size=5),
    st.integers(1, 3),
    st.integers(1, 5),
    st.integers(0, 5),
)
def test_windows_equal_a_loop(lengths, observation_steps, execution_steps, extra):
    prediction_steps = observation_steps - 1 + execution_steps + extra
    frames = np.arange(sum(lengths), dtype=np.float32)[:, None]
    buffer = ReplayBuffer({"x": frames, "action": frames}, np.cumsum(lengths))
    sizes = (observation_steps, prediction_steps, execution_steps)
    windows = Windows(buffer, ["x"], observation_steps=sizes[0], prediction_steps=sizes[1], execution_steps=sizes[2])
    expected = windows_by_hand(lengths, *sizes)
    assert windows.indices.tolist() == expected
    batch = windows.gather(torch.arange(len(windows)))
    np.testing.assert_array_equal(batch["action"][..., 0].numpy(), expected)
    np.testing.assert_array_equal(batch["obs"]["x"][..., 0].numpy(), np.array(expected)[:, :observation_steps])


def test_a_batch_has_the_promised_shapes_and_types(make_buffer):
    buffer = make_buffer(images=True)
    buffer.data["reward"] = np.arange(15.0)
    windows = Windows(
        buffer, ["img", "state", "reward"], observation_steps=2, prediction_steps=4, execution_steps=2, episodes=[1]
    )
    batch = windows.gather(torch.tensor([1, 0, 1]))
    obs = batch["obs"]
    assert {key: tuple(value.shape) for key, value in obs.items()} == {
        "img": (3, 2, 12, 10, 3),
        "state": (3, 2, 2),
        "reward": (3, 2, 1),
    }
    assert obs["img"].dtype == torch.uint8
    assert obs["reward"].dtype == obs["state"].dtype == batch["action"].dtype == torch.float32
    assert obs["img"][:, :, 0, 0, 0].tolist() == [[4, 5], [4, 4], [4, 5]]
    assert batch["action"][..., 0].tolist() == [[40, 50, 60, 70], [40, 40, 50, 60], [40, 50, 60, 70]]


def test_a_batch_is_a_copy(make_buffer):
    buffer = make_buffer()
    windows = Windows(buffer, ["state"], observation_steps=1, prediction_steps=2, execution_steps=2)
    windows.gather(torch.tensor([0]))["action"].zero_().add_(7)
    assert buffer.data["action"][:2, 0].tolist() == [0, 10]


@pytest.mark.parametrize(
    ("in_memory", "room", "kind"), [(True, True, np.ndarray), (False, True, np.memmap), (False, False, zarr.Array)]
)
def test_windows_from_disk_equal_windows_from_memory(make_buffer, tmp_path, monkeypatch, in_memory, room, kind):
    monkeypatch.setattr("flowsteer.datasets.opening.has_room", lambda size: room)
    buffer = make_buffer(images=True)
    sizes = {"observation_steps": 2, "prediction_steps": 6, "execution_steps": 3}
    stored = open_dataset(write_zarr(buffer, tmp_path / "d.zarr"), in_memory=in_memory)
    expected = Windows(buffer, ["img", "state"], **sizes)
    found = Windows(stored, ["img", "state"], **sizes)
    assert type(stored.data["img"]) is kind
    assert found.on_disk is not in_memory
    wanted = torch.tensor([5, 0, 5, 8, 2])
    for key in ("img", "state"):
        assert torch.equal(found.gather(wanted)["obs"][key], expected.gather(wanted)["obs"][key])
    assert torch.equal(found.gather(wanted)["action"], expected.gather(wanted)["action"])


@pytest.mark.parametrize(
    ("sizes", "message"),
    [((2, 4, 4), "2 - 1 \\+ 4 > 4"), ((0, 4, 2), "at least 1"), ((1, 4, 0), "at least 1")],
)
def test_impossible_sizes_are_refused(make_buffer, sizes, message):
    with pytest.raises(DataError, match=message):
        Windows(
            make_buffer(), ["state"], observation_steps=sizes[0], prediction_steps=sizes[1], execution_steps=sizes[2]
        )


def test_missing_keys_and_no_episodes_are_refused(make_buffer):
    sizes = {"observation_steps": 1, "prediction_steps": 2, "execution_steps": 1}
    with pytest.raises(DataError, match="no key 'actions': did you mean 'action'"):
        Windows(make_buffer(), ["state"], action_key="actions", **sizes)
    with pytest.raises(DataError, match="no episode is chosen"):
        Windows(make_buffer(), ["state"], episodes=np.zeros(3, bool), **sizes)
