"""The `flowsteer` command as a program."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from flowsteer.cli.errors import UsageError, exit_code, one_line, unknown
from flowsteer.cli.main import COMMANDS, main
from flowsteer.datasets.errors import DataError

FLOWSTEER = Path(sys.executable).with_name("flowsteer")


def test_help_is_instant_and_lists_every_subcommand(environment: dict[str, str]) -> None:
    started = time.perf_counter()
    done = subprocess.run([FLOWSTEER, "--help"], env=environment, capture_output=True, text=True, check=True)
    # Importing torch alone takes longer.
    assert time.perf_counter() - started < 1.5
    assert all(f"  {name}" in done.stdout for name in COMMANDS)


def test_a_command_line_without_a_command_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert capsys.readouterr().err == (
        "error: flowsteer needs a command: train, finetune, distill, rti, eval, export, data, demo, bench; "
        "see flowsteer --help\n"
    )
    assert main(["evil"]) == 2
    assert capsys.readouterr().err.startswith("error: command 'evil' is unknown; nearest: eval (known: ")


def test_every_subcommand_has_help(capsys: pytest.CaptureFixture[str]) -> None:
    for name in COMMANDS:
        assert main([name, "--help"]) == 0
        assert f"flowsteer {name}" in capsys.readouterr().out


def test_errors_that_a_user_can_mend_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    assert exit_code(UsageError("x")) == 2
    assert exit_code(DataError("x")) == 1
    assert exit_code(ZeroDivisionError("x")) is None
    full = OSError(28, "No space left on device", "/data/a")
    assert exit_code(full) == 1
    assert one_line(full) == "/data/a: No space left on device"
    assert one_line(DataError("two\n  lines")) == "two lines"
    assert one_line(ValueError()) == "ValueError"
    monkeypatch.setenv("FLOWSTEER_DEBUG", "1")
    assert exit_code(DataError("x")) is None


def test_the_nearest_name_comes_first() -> None:
    assert str(unknown("task", "pusth", ["lift", "pusht"])) == (
        "task 'pusth' is unknown; nearest: pusht (known: lift, pusht)"
    )


def test_an_interrupt_is_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(*args: object) -> int:
        raise KeyboardInterrupt("stopped at step 3")

    monkeypatch.setattr("flowsteer.cli.main.dispatch", interrupted)
    assert main(["train"]) == 130
    assert capsys.readouterr().err == "stopped at step 3\n"


def test_a_warning_is_one_line(environment: dict[str, str]) -> None:
    code = (
        "import sys, warnings, flowsteer.cli.main as m; sys.argv = ['flowsteer', '--help']; m.main(); "
        "warnings.warn('no video', RuntimeWarning)"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stderr == "warning: no video\n"
