from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig

from flowsteer.cli.bench import BENCHMARKS, benchmark, print_rows
from flowsteer.cli.main import main


@dataclass
class Count:
    upto: int = 2
    out: str | None = None


def measure(config: DictConfig) -> dict[str, Any]:
    return {"rows": [{"number": f"n{i}", "rate": 1000.0 * i} for i in range(config.upto)], "best": float("nan")}


def test_a_benchmark_writes_its_numbers_and_prints_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmark("count", "Count.", Count, measure)(["upto=3", f"out={tmp_path}"]) == 0
    result = json.loads((tmp_path / "count.json").read_text())
    assert result["rows"][2] == {"number": "n2", "rate": 2000.0}
    assert result["best"] is None
    assert result["machine"]["torch_threads"] == 1
    assert result["versions"]["torch"]
    out = capsys.readouterr().out
    assert "2,000" in out
    assert f"written to {tmp_path / 'count.json'}" in out


def test_every_benchmark_has_help_and_an_unknown_one_its_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    for name in BENCHMARKS:
        assert main(["bench", name, "--help"]) == 0
        assert f"flowsteer bench {name}: " in capsys.readouterr().out
    assert main(["bench", "loadr"]) == 2
    assert capsys.readouterr().err.startswith("error: command 'loadr' is unknown; nearest: loader (known: ")


def test_large_numbers_are_told_in_full(capsys: pytest.CaptureFixture[str]) -> None:
    print_rows("returns", [{"return": {"mean": 2967.4, "low": 999.4, "high": 3038.0}, "env_steps": 2.02e6}])
    out = capsys.readouterr().out
    assert "2,967 (999 to 3,038)" in out


def test_a_table_for_a_file_has_a_line_for_each_row_however_wide(capsys: pytest.CaptureFixture[str]) -> None:
    scores = {"mean": 0.76543, "low": 0.65432, "high": 0.87654}
    print_rows("wide", [{f"score_{n}": scores for n in range(8)} | {"name": "a", "nothing": None}] * 2)
    first, second = [line for line in capsys.readouterr().out.splitlines() if "0.765" in line]
    assert first.count("0.765 (0.654 to 0.877)") == 8
    assert first == second
