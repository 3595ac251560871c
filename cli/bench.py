"""`flowsteer bench NAME`: measure, print a table and write NAME.json.

A new benchmark is one module with a config, a function(config) -> {"rows": [{column: value}, ...], ...}, where it helps
a plot of that, `main = benchmark(...)`, and one line in BENCHMARKS.
"""

from __future__ import annotations

import os
import platform
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from flowsteer.cli.application import Application
from flowsteer.cli.dispatch import Command, dispatch
from flowsteer.cli.files import write_json
from flowsteer.sim.results import versions

BENCHMARKS: dict[str, Command] = {
    "loader": Command("flowsteer.cli.bench_loader:main", "training batches per second, beside a per-sample loader"),
    "latency": Command("flowsteer.cli.bench_latency:main", "time per chunk at batch 1, beside a diffusers scheduler"),
    "sim": Command("flowsteer.cli.bench_sim:main", "env steps per second of each back end, beside Gymnasium's"),
    "warp": Command("flowsteer.cli.bench_warp:main", "env steps per second of MuJoCo Warp, and where the time goes"),
    "backends": Command("flowsteer.cli.bench_backends:main", "whether two back ends agree: returns, states"),
    "experts": Command("flowsteer.cli.bench_experts:main", "how often the scripted experts succeed, by noise"),
    "update": Command("flowsteer.cli.bench_update:main", "one iteration of DPPO, beside a straightforward one"),
    "descent": Command("flowsteer.cli.bench_descent:main", "scores of an energy-based policy by its gradient steps"),
    "tradeoff": Command("flowsteer.cli.bench_tradeoff:main", "scores by network evaluations, of judged runs"),
    "cloning": Command("flowsteer.cli.bench_cloning:main", "judged runs in one table and one plot"),
    "finetune": Command("flowsteer.cli.bench_finetune:main", "judged runs of finetune, beside what they started from"),
}


def main(args: Sequence[str]) -> int:
    """Run a command line and return its exit code."""
    return dispatch("flowsteer bench", "Measure how fast things are.", BENCHMARKS, args)


UNLIMITED = 1000
"""Columns of a file, or of what reads a pipe."""
Measure = Callable[[DictConfig], Mapping[str, Any]]
Plot = Callable[[Mapping[str, Any], Path], None]
"""(result, picture to write)."""


@final
@dataclass(frozen=True)
class _Benchmark:
    """What a benchmark does with its folder; a class, so that launchers can pickle it."""

    name: str
    measure: Measure
    plot: Plot | None

    def __call__(self, config: DictConfig, folder: Path) -> None:
        file = folder / config.get("name", self.name)
        result = self.measure(config)
        command = made_by("bench", self.name)
        write_json(
            file.with_suffix(".json"), {"command": command, **result, "machine": machine(), "versions": versions()}
        )
        if self.plot is not None:
            self.plot(result, file.with_suffix(".png"))
        print_rows(file.name, result["rows"])
        print(f"written to {file}.json")


def benchmark(name: str, summary: str, config: type, measure: Measure, plot: Plot | None = None) -> Application:
    """The subcommand `flowsteer bench NAME`.

    Args:
        name, summary: for the help.
        config: a dataclass with an `out: str | None = None`, and a `name: str` if the files' name can be chosen.
        measure: makes what NAME.json holds besides the machine and the command; `rows` are printed.
        plot: makes NAME.png of it.
    """
    run = _Benchmark(name, measure, plot)
    return Application(f"bench_{name}", summary, config, run, lambda composed: Path("runs/bench"))


def made_by(*words: str) -> str:
    """The command line that is running: the words of the subcommand, then its options."""
    return shlex.join(["flowsteer", *words, *HydraConfig.get().overrides.task])


def machine() -> dict[str, Any]:
    """What the numbers depend on besides versions."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def print_rows(title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Rows with the same columns as a table; no number in it is cut short, however narrow the terminal."""
    table = Table(title=title, title_justify="left")
    for column in rows[0]:
        table.add_column(
            column.replace("_", " "), justify="left" if isinstance(rows[0][column], str) else "right", overflow="fold"
        )
    for row in rows:
        table.add_row(*map(_cell, row.values()))
    Console(width=None if sys.stdout.isatty() else UNLIMITED).print(table)


def _cell(value: Any) -> str:
    """Numbers to four digits; a mapping (a mean and its bounds) as "mean (low to high)", of one as that; None as ""."""
    if value is None:
        return ""
    if isinstance(value, Mapping):
        mean, low, high = map(_short, value.values())
        return mean if low == high else f"{mean} ({low} to {high})"
    return f"{value:,.4g}" if isinstance(value, float) else str(value)


def _short(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
