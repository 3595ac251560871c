"""robomimic itself opens what we write, and reads the same windows from it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from flowsteer.datasets import Windows, write_robomimic

dataset = pytest.importorskip("robomimic.utils.dataset", reason="needs the robomimic extra", exc_type=ImportError)


@pytest.mark.parametrize("cache", [None, "all"])
def test_sequence_dataset_and_windows_agree(make_buffer, tmp_path, cache):
    from robomimic.utils import obs_utils

    buffer = make_buffer((4, 9, 12), images=True)
    path = write_robomimic(buffer, tmp_path / "d.hdf5", {"env_name": "Lift", "type": 1, "env_kwargs": {}})
    obs_utils.initialize_obs_utils_with_obs_specs({"obs": {"low_dim": ["state"], "rgb": ["img"]}})
    theirs = dataset.SequenceDataset(
        str(path),
        obs_keys=["state", "img"],
        dataset_keys=["actions", "dones"],
        frame_stack=2,
        seq_length=5,
        pad_frame_stack=True,
        pad_seq_length=True,
        hdf5_cache_mode=cache,
        load_next_obs=True,
    )
    # robomimic pads up to the last step, which is Ta = Tp - To + 1 here.
    ours = Windows(buffer, ["state", "img"], observation_steps=2, prediction_steps=6, execution_steps=5)
    assert len(ours) == len(theirs) == 25
    batch = ours.gather(torch.arange(25))
    for number in range(25):
        sample = theirs[number]
        np.testing.assert_array_equal(sample["actions"], batch["action"][number].numpy())
        for key in ("state", "img"):
            np.testing.assert_array_equal(sample["obs"][key][:2], batch["obs"][key][number].numpy())
    assert theirs[3]["next_obs"]["state"][-1, 0] == 3
