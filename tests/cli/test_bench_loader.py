from __future__ import annotations

import numpy as np
import pytest
import torch

from flowsteer.cli import bench_loader
from flowsteer.cli.bench_loader import SampleBySample, Ta, To, Tp, run
from flowsteer.datasets import ReplayBuffer, Windows, write_zarr


@pytest.fixture
def buffer():
    generator = np.random.default_rng(0)
    data = {
        "state": generator.random((60, 5), np.float32),
        "action": generator.random((60, 2), np.float32),
        "img": generator.integers(0, 256, (60, 96, 96, 3), np.uint8),
    }
    return ReplayBuffer(data, np.array([25, 28, 60]))


@pytest.mark.parametrize("float_images", [False, True])
def test_both_loaders_hand_out_the_same_windows(buffer, float_images):
    keys = ("img", "state")
    windows = Windows(buffer, keys, observation_steps=To, prediction_steps=Tp, execution_steps=Ta)
    finish = bench_loader._images_as_float if float_images else bench_loader._as_it_is
    batch = finish(windows.gather(torch.arange(len(windows))))
    samples = SampleBySample(buffer, keys, windows, float_images=float_images)
    assert len(samples) == len(windows) > 0
    for number in range(len(windows)):
        sample = samples[number]
        assert torch.equal(sample["action"], batch["action"][number])
        for key in keys:
            assert torch.equal(sample["obs"][key], batch["obs"][key][number])


def test_the_result_has_a_row_for_every_contender(buffer, tmp_path):
    path = write_zarr(buffer, tmp_path / "small.zarr")
    result = run(path, seconds=0.02, low_dim_batch=16, image_batch=4)
    assert result["frames"] == 60
    assert set(result["ratios"]) == {"low_dim", "image", "image as float"}
    for kind in result["ratios"]:
        rows = {row["loader"]: row for row in result["rows"] if row["data"] == kind}
        assert set(rows) == {"bare gather", "batches", "sample by sample, 0 workers", "sample by sample, 2 workers"}
        assert all(row["samples_per_s"] > 0 for row in rows.values())
        assert min(row["ratio"] for name, row in rows.items() if name.startswith("sample")) <= 1
        assert result["ratios"][kind] == rows["batches"]["ratio"]


@pytest.mark.parametrize("kind", bench_loader.RACES)
def test_every_contender_draws_whole_batches_of_the_same_windows(buffer, kind):
    race = bench_loader.RACES[kind]
    windows = Windows(buffer, race.keys, observation_steps=To, prediction_steps=Tp, execution_steps=Ta)
    everything = bench_loader.SampleBySample(buffer, race.keys, windows, float_images=False)
    known = {everything[number]["action"].numpy().tobytes() for number in range(len(everything))}
    contenders = bench_loader._contenders(buffer, race, 8)
    assert list(contenders) == ["bare gather", "batches", "sample by sample, 0 workers", "sample by sample, 2 workers"]
    batches = {name: next(contenders[name]()) for name in list(contenders)[:3]}
    for batch in batches.values():
        assert {action.numpy().tobytes() for action in batch["action"]} <= known
    ours, theirs = batches["batches"], batches["sample by sample, 0 workers"]
    assert set(ours["obs"]) == set(theirs["obs"]) == set(race.keys)
    for key in race.keys:
        assert ours["obs"][key].shape == theirs["obs"][key].shape
        assert ours["obs"][key].dtype == theirs["obs"][key].dtype
        assert len(ours["obs"][key]) == 8


def test_made_up_data_have_the_shape_of_push_t(monkeypatch):
    monkeypatch.setattr(bench_loader, "EPISODES", 2)
    buffer = bench_loader._made_up()
    assert {key: array.shape for key, array in buffer.data.items()} == {
        "state": (248, 5),
        "action": (248, 2),
        "img": (248, 96, 96, 3),
    }
    assert buffer.episode_ends.tolist() == [124, 248]
