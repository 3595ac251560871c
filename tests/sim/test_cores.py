import subprocess
import sys

import pytest

from flowsteer.sim.cores import usable_cores


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux binds processes to cores")
def test_only_the_cores_that_are_allowed_count():
    code = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); " + (
        "from flowsteer.sim.cores import usable_cores; print(usable_cores())"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert int(found) == 1


def test_there_is_a_core_where_the_system_does_not_tell(monkeypatch):
    monkeypatch.delattr("os.sched_getaffinity", raising=False)
    monkeypatch.setattr("os.cpu_count", lambda: None)
    assert usable_cores() == 1
