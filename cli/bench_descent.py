"""`flowsteer bench descent`: how an energy-based policy scores by the gradient steps that a chunk may take."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

import numpy as np
from matplotlib.figure import Figure
from omegaconf import DictConfig

from flowsteer.cli.bench import benchmark
from flowsteer.cli.checks import check_not_negative, check_positive, check_seeds
from flowsteer.cli.devices import find_device
from flowsteer.cli.errors import UsageError
from flowsteer.cli.judged_runs import PLOTTED, check_runs
from flowsteer.cli.simulation import check_kept, find_task, judge, make_environments
from flowsteer.configs.simulation import SimOptions
from flowsteer.policies.checkpoint import load_policy, read_config
from flowsteer.policies.ebt import EnergyPolicy
from flowsteer.sim.plots import save_figure


@final
@dataclass
class DescentBenchmark:
    """What to judge.

    Attributes:
        runs: run folders (their last averaged weights), RUN/best, or checkpoints.
        steps: most gradient steps of a chunk; each is judged.
        tolerance: length of a step below which a row rests; each policy's own where not given, 0 to take all steps.
        episodes: of each row, from the same seeds.
        seed: of the first episode; the others follow.
        device: where the policy runs, "auto" (a GPU where there is one) or "cpu".
        name: of the files to write.
        out: where to write them.
    """

    runs: list[str] = field(default_factory=list)
    steps: list[int] = field(default_factory=lambda: [2, 4, 8, 16])
    tolerance: float | None = None
    episodes: int = 100
    seed: int = 10_000
    device: str = "auto"
    sim: SimOptions = field(default_factory=SimOptions)
    name: str = "descent"
    out: str | None = None


def measure(config: DictConfig) -> dict[str, Any]:
    """`rows`: one per run and number of steps, with the mean number of steps that chunks took."""
    check_positive(config, "steps", "episodes")
    check_not_negative(config, "tolerance")
    check_seeds(config, "seed")
    policies = {run: _policy(run, config) for run in check_runs(config.runs)}
    rows = [row for run, policy in policies.items() for row in _judged(run, policy, config)]
    return {"rows": rows, **{name: config[name] for name in ("episodes", "seed")}}


def _policy(run: Path, config: DictConfig) -> EnergyPolicy:
    policy = load_policy(run, find_device(config.device))
    if not isinstance(policy, EnergyPolicy):
        raise UsageError(f"{run} holds {type(policy).__name__}, which descends no energy: give runs of policy=ebt")
    if config.tolerance is not None:
        policy.tolerance = config.tolerance
    return policy


def _judged(run: Path, policy: EnergyPolicy, config: DictConfig) -> Iterator[dict[str, Any]]:
    task, device = find_task(None, read_config(run)), find_device(config.device)
    with closing(
        make_environments(task, config.sim, config.episodes, policy.spec.observation_steps, device)
    ) as environments:
        for steps in config.steps:
            policy.max_steps = steps
            protocol = {"episodes": config.episodes, "seed": config.seed, "delay_steps": 0}
            result = judge(policy, environments, f"{run.name}, at most {steps} steps", **protocol)
            check_kept(result)
            yield {
                "run": str(run),
                "most_steps": steps,
                "mean_steps": result.network_evaluations,
                **{score: getattr(result, score)._asdict() for score in PLOTTED},
                "decision_ms": 1e3 * float(np.median(result.decision_s)),
            }


def plot(result: Mapping[str, Any], file: Path) -> None:
    """Scores against the mean number of gradient steps, a line per run."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    runs = list(dict.fromkeys(row["run"] for row in result["rows"]))
    for axes, score in zip(figure.subplots(1, len(PLOTTED)), PLOTTED, strict=True):
        for run in runs:
            rows = [row for row in result["rows"] if row["run"] == run]
            mean, low, high = (np.array([row[score][name] for row in rows]) for name in ("mean", "low", "high"))
            steps = [row["mean_steps"] for row in rows]
            axes.errorbar(steps, mean, yerr=[mean - low, high - mean], marker="o", capsize=3, label=Path(run).name)
        axes.set(xlabel="gradient steps per chunk, mean", ylabel=score.replace("_", " "), ylim=(0, 1.05))
        axes.grid(alpha=0.3)
    figure.axes[0].legend(fontsize="small")
    save_figure(figure, file, dpi=110)


main = benchmark("descent", "How an energy-based policy scores by its gradient steps.", DescentBenchmark, measure, plot)
