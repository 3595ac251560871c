"""What the adapter calls of Isaac Gym, against the published type stubs."""

import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest

from flowsteer.sim import isaac_gym

CONFIG = """
[mypy]
strict = True
mypy_path = {folder}/stubs
follow_imports = skip
ignore_missing_imports = True
[mypy-isaacgym.*]
follow_imports = silent
ignore_errors = True
"""


@pytest.fixture
def stubs(tmp_path):
    try:
        published = Path(distribution("isaacgym-stubs").locate_file("isaacgym-stubs"))
    except PackageNotFoundError:
        pytest.skip("isaacgym-stubs is not installed")
    repaired = tmp_path / "stubs" / "isaacgym"
    repaired.mkdir(parents=True)
    (repaired / "__init__.pyi").write_text("from .gymapi import *\n")
    text = (published / "gymapi.pyi").read_text()
    assert "def lambda(" in text, "the stubs have been repaired: let mypy read them as they are"
    (repaired / "gymapi.pyi").write_text(text.replace("def lambda(", "def lambda_("))
    (tmp_path / "mypy.ini").write_text(CONFIG.format(folder=tmp_path))
    return tmp_path


def test_the_calls_fit_the_stubs_and_a_wrong_one_is_noticed(stubs):
    source = Path(isaac_gym.__file__).read_text()
    assert "task.gym.destroy_sim(task.sim)" in source
    (stubs / "right.py").write_text(source)
    (stubs / "wrong.py").write_text(source.replace("task.gym.destroy_sim(task.sim)", "task.gym.destroy_sim(task.dt)"))
    command = [sys.executable, "-m", "mypy", "--config-file", "mypy.ini", "right.py", "wrong.py"]
    ended = subprocess.run(command, cwd=stubs, capture_output=True, text=True, check=False)
    errors = [line for line in ended.stdout.splitlines() if ": error:" in line]
    assert len(errors) == 1, ended.stdout + ended.stderr
    assert errors[0].startswith("wrong.py")
    assert 'incompatible type "float"; expected "Sim"' in errors[0]
