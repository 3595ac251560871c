"""Devices and processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from flowsteer.cli.devices import find_device, find_processes
from flowsteer.cli.errors import UsageError


def test_a_device_is_auto_or_cpu() -> None:
    assert find_device("cpu").type == "cpu"
    with pytest.raises(UsageError, match=r"device 'gpu' is unknown; nearest: cpu"):
        find_device("gpu")


def test_processes_that_do_not_know_of_each_other_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with pytest.raises(UsageError, match=r"2 processes .* \(LOCAL_RANK is not set\): start them with torchrun or acc"):
        find_processes("cpu")


@pytest.mark.parametrize("device", ["auto", "cpu"])
def test_processes_of_torchrun_find_each_other(device: str, tmp_path: Path) -> None:
    script = tmp_path / "worker.py"
    script.write_text(
        f"import sys\n"
        f"from flowsteer.cli.devices import find_processes\n"
        f"a = find_processes({device!r})\n"
        f"sys.stdout.write(f'rank {{a.process_index}} of {{a.num_processes}}\\n')\n"  # One write: lines stay whole.
    )
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(launch, capture_output=True, text=True, env=environment, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.split("\n"))[-2:] == ["rank 0 of 2", "rank 1 of 2"]
