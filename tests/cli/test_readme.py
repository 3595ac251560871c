from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flowsteer.cli.main import main
from flowsteer.datasets.replay_buffer import ReplayBuffer
from flowsteer.datasets.zarr_store import write_zarr

README = Path(__file__).parents[2] / "README.md"


def test_the_example_acts_with_a_policy_that_sees_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny: tuple[str, ...]
) -> None:
    monkeypatch.chdir(tmp_path)
    frames = {"img": np.zeros((40, 96, 96, 3), np.uint8), "state": np.ones((40, 5)), "action": np.ones((40, 2))}
    dataset = write_zarr(ReplayBuffer(frames, np.array([20, 40])), tmp_path / "images.zarr")
    options = ["task=pusht_image", "encoder=image_vit", "train.steps=1", "train.batch_size=2", "out=runs/a"]
    assert main(["train", f"dataset={dataset}", *tiny, *options]) == 0
    (example,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    names: dict[str, Any] = {}
    exec(example, names)
    assert names["actions"].shape == (1, 8, 2)
