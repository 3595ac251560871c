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


def test_processes_of_torchrun_find_each_other(tmp_path: Path) -> None:
    script = tmp_path / "worker.py"
    # With no GPU to be seen both are on the CPU, however it was named, and meet.
    script.write_text(
        "import os, sys\n"
        "import torch\n"
        "from flowsteer.cli.devices import find_processes\n"
        "device = ('auto', 'cpu')[int(os.environ['RANK'])]\n"
        "a = find_processes(device)\n"
        "met = a.gather(torch.ones(1)).sum()\n"
        "told = f'{device}: rank {a.process_index} of {a.num_processes}, {met:g} met\\n'\n"
        "sys.stdout.write(told)\n"  # One write: lines stay whole.
    )
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(launch, capture_output=True, text=True, env=environment, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == ["auto: rank 0 of 2, 2 met", "cpu: rank 1 of 2, 2 met"]
