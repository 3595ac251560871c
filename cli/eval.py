"""`flowsteer eval`: judge a checkpoint in simulation."""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from flowsteer.cli.application import Application
from flowsteer.cli.checks import check_not_negative, check_positive, check_seeds, find_checkpoint
from flowsteer.cli.devices import find_device
from flowsteer.cli.execution import execute_steps, find_execution, name_of
from flowsteer.cli.files import result_folder
from flowsteer.cli.refusals import Composed
from flowsteer.cli.simulation import check_kept, find_task, run_episodes
from flowsteer.configs.evaluation import EvaluationConfig
from flowsteer.policies.checkpoint import load_policy, read_config, resolve
from flowsteer.sim.evaluate import Evaluation
from flowsteer.sim.results import summary, write_evaluation


def run(config: DictConfig, folder: Path) -> float:
    """Evaluate and write eval.json, plots and videos to `folder`; returns the share of successes.

    Raises:
        UsageError, PolicyError, SimError: bad options, checkpoint or task, or every episode was lost.
    """
    checkpoint = _checkpoint(config)
    device, options = find_device(config.device), config.eval
    policy, stored = load_policy(checkpoint, device, config.weights), read_config(checkpoint)
    execute_steps(policy, config)
    task = find_task(config.task, stored)
    result = run_episodes(
        policy,
        task,
        config.sim,
        episodes=config.episodes,
        seed=config.seed,
        delay_steps=options.delay_steps,
        execution=find_execution(config, policy, stored),
        device=device,
    )
    write_evaluation(result, folder, task, options.videos)
    print_table(result, folder)
    check_kept(result)
    return result.success.mean


def _checkpoint(config: DictConfig) -> Path:
    checkpoint = find_checkpoint(config)
    check_positive(config, "episodes")
    check_seeds(config, "seed")
    check_not_negative(config, "eval.videos", "eval.delay_steps")
    return checkpoint


def print_table(result: Evaluation, folder: Path) -> None:
    """What eval.json says, for people."""
    numbers = summary(result)
    table = Table(title=f"{result.task}: {numbers['episodes']} episodes", title_justify="left")
    for column in ("", "mean", "95 % interval"):
        table.add_column(column)
    for name in ("success", "max_reward", "return"):
        interval = numbers[name]
        table.add_row(name, _number(interval["mean"]), f"{_number(interval['low'])} to {_number(interval['high'])}")
    decision = numbers["decision_ms"]
    table.add_row("decision", f"{_number(decision['p50'])} ms", f"95 % below {_number(decision['p95'])} ms")
    table.add_row(
        "evaluations", _number(numbers["network_evaluations"]), f"of the network, execution={result.execution}"
    )
    console = Console()
    console.print(table)
    if numbers["lost"]:
        console.print(f"{numbers['lost']} episodes were lost and count for nothing (see the warnings above)")
    console.print(f"written to {folder}", soft_wrap=True, highlight=False)


def _number(value: float | None) -> str:
    return "?" if value is None else f"{value:.4g}"


def default_out(composed: Composed) -> Path:
    """RUN/eval-EPISODESxSEED; what tells another checkpoint than the last, or another execution, comes first."""
    config = composed.config
    checkpoint = _checkpoint(config).expanduser()
    resolve(checkpoint)
    return result_folder(checkpoint, "eval", f"{name_of(config)}{config.episodes}x{config.seed}")


main = Application(
    "eval", "Judge a checkpoint in simulation.", EvaluationConfig, run, default_out, paths=("checkpoint",)
)
