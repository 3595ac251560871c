from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from flowsteer.policies.checkpoint import load_policy

pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
FLOWSTEER = str(Path(sys.executable).with_name("flowsteer"))


def test_a_sweep_whose_jobs_another_program_starts(dataset: Path, tmp_path: Path, tiny: tuple[str, ...]) -> None:
    # A relative path means the folder of the launch, wherever the jobs run.
    options = [f"dataset={dataset.name}", f"out={tmp_path / 'sweep'}", "train.steps=2", "seed=0,1", *tiny]
    done = subprocess.run(
        [FLOWSTEER, "train", "-m", "hydra/launcher=submitit_local", *options],
        cwd=dataset.parent,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    for seed in (0, 1):
        assert load_policy(tmp_path / "sweep" / f"seed={seed}").spec.action_dim == 2
