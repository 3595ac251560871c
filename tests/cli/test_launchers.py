from __future__ import annotations

from pathlib import Path

import pytest

from flowsteer.cli.main import main
from flowsteer.policies.checkpoint import load_policy

pytest.importorskip("hydra_plugins.hydra_submitit_launcher")


def test_a_sweep_whose_jobs_another_program_starts(
    dataset: Path, tmp_path: Path, tiny: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    # A relative path means the folder of the launch, wherever the jobs run.
    monkeypatch.chdir(dataset.parent)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    options = [f"dataset={dataset.name}", f"out={tmp_path / 'sweep'}", "train.steps=2", "seed=0,1", *tiny]
    assert main(["train", "-m", "hydra/launcher=submitit_local", *options]) == 0
    for seed in (0, 1):
        assert load_policy(tmp_path / "sweep" / f"seed={seed}").spec.action_dim == 2
