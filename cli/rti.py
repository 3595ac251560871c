"""`flowsteer rti`: choose by measurement where chunks start from the ones before, and write it to the checkpoint."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from flowsteer.cli.application import Application
from flowsteer.cli.bench import machine, made_by, print_rows
from flowsteer.cli.checks import (
    check_filled,
    check_not_negative,
    check_positive,
    check_seeds,
    check_times,
    find_checkpoint,
)
from flowsteer.cli.devices import find_device
from flowsteer.cli.execution import RTI, SYNC, Execution, execute_steps, name_of
from flowsteer.cli.files import result_folder, write_json
from flowsteer.cli.refusals import Composed
from flowsteer.cli.rti_plot import plot
from flowsteer.cli.simulation import check_kept, find_task, judge, make_environments
from flowsteer.configs.rti import RtiConfig
from flowsteer.policies.checkpoint import load_policy, read_config, resolve, write_config
from flowsteer.policies.errors import PolicyError
from flowsteer.policies.policy import Policy
from flowsteer.policies.rti import RealTimeIteration, RtiOptions, denoising
from flowsteer.policies.rti_measures import Recorder, contraction
from flowsteer.sim.evaluate import Evaluation
from flowsteer.sim.results import versions
from flowsteer.sim.seams import seam_sizes
from flowsteer.sim.tasks.base import Task
from flowsteer.sim.vec_env import VecEnv

JUMP_MARGIN = 1.5
"""A jump is so many times as large as what changes between decisions usually are without real-time iteration."""
SCORES = ("success", "max_reward")
PRINTED = ("start", "steps", "renoise", *SCORES, "evaluations", "seam", "seam_share", "contraction")

Row = dict[str, Any]


def run(config: DictConfig, folder: Path) -> float:
    """Measure, print, write rti.json and rti.png to `folder`, and the choice to the checkpoint; returns its success.

    Raises:
        UsageError, PolicyError, SimError: bad options, checkpoint or task, or nothing that was tried is good enough;
            the checkpoint is then as it was.
    """
    checkpoint, device = _checkpoint(config), find_device(config.device)
    # What the name stands for may be another checkpoint by the time of the choice.
    measured = resolve(checkpoint)
    policy, stored = load_policy(measured, device, config.weights), read_config(measured)
    execute_steps(policy, config)
    if len(denoising(policy).grid) == 2:
        raise PolicyError(f"{checkpoint} takes one step as it is: real-time iteration has nothing to save")
    task, candidates = find_task(config.task, stored), list(_candidates(config))
    for options in candidates:
        # Refused before anything has run.
        RealTimeIteration(policy, options)
    with closing(
        make_environments(task, config.sim, config.episodes, policy.spec.observation_steps, device)
    ) as environments:
        rows, jump = _measure(config, policy, task, environments, candidates)
    chosen = choose(rows, config.tolerance)
    choice = None if chosen is None else asdict(replace(candidates[rows.index(chosen) - 1], jump=jump))
    _write(config, folder, policy, rows, choice)
    if chosen is None or choice is None:
        raise PolicyError(_nothing_chosen(rows, config.tolerance, checkpoint))
    if not rows[0]["success"]["mean"]:
        warnings.warn(
            "no episode of the policy itself succeeded, so the choice rests on the maximum reward alone: "
            "take more episodes, or a policy that succeeds",
            stacklevel=2,
        )
    write_choice(measured, policy.spec.execution_steps, choice)
    print(
        f"chosen: start={chosen['start']:g} steps={chosen['steps']} renoise={str(chosen['renoise']).lower()}; "
        f"judge it with: flowsteer eval checkpoint={checkpoint} execution={RTI}{_again(config)}"
    )
    return float(chosen["success"]["mean"])


def write_choice(checkpoint: Path, execution_steps: int, choice: dict[str, Any]) -> None:
    """Put a choice for Ta = `execution_steps` into a checkpoint's config.yaml, beside those for other Ta."""
    stored = read_config(checkpoint)
    choices, spec = {**stored.pop(RTI, {}), execution_steps: choice}, stored.pop("spec")
    # The spec stays last: a file that is cut off lacks it, and is told so.
    write_config(checkpoint, {**stored, RTI: choices, "spec": spec})


def choose(rows: Sequence[Row], tolerance: float) -> Row | None:
    """The row with the fewest steps, then the highest success, that loses little against the first; None if none does.

    Little: `tolerance` in the mean maximum reward; in success, which takes many more episodes to tell, what the 95 %
    interval leaves open.
    """
    reference, *tried = rows
    good = [
        row
        for row in tried
        if row["max_reward"]["mean"] >= reference["max_reward"]["mean"] - tolerance
        and row["success"]["high"] >= reference["success"]["mean"] - tolerance
    ]
    return min(good, key=lambda row: (row["steps"], *(-row[score]["mean"] for score in SCORES)), default=None)


def _checkpoint(config: DictConfig) -> Path:
    checkpoint = find_checkpoint(config)
    check_positive(config, "episodes", "steps")
    check_times(config, "starts")
    check_filled(config, "renoise")
    check_seeds(config, "seed")
    check_not_negative(config, "tolerance", "jump")
    return checkpoint


def _candidates(config: DictConfig) -> Iterator[RtiOptions]:
    for steps, renoise, start in product(config.steps, config.renoise, config.starts):
        rest = (config.refresh_every, config.jump or 0.0, config.binarise, config.discrete_weight)
        yield RtiOptions(start, steps, renoise, *rest)


def _measure(
    config: DictConfig, policy: Policy, task: Task, environments: VecEnv, candidates: Sequence[RtiOptions]
) -> tuple[list[Row], float]:
    """A row for the policy itself and one for each candidate, and the change of an observation that is a jump."""
    protocol: dict[str, Any] = {"episodes": config.episodes, "seed": config.seed, "delay_steps": 0}
    recorder = Recorder(policy)
    reference = judge(policy, environments, SYNC, execution=Execution(SYNC, {}, recorder), **protocol)
    check_kept(reference)
    situations = recorder.situations()
    jump = JUMP_MARGIN * recorder.usual_change() if config.jump is None else config.jump
    own = {"start": None, "renoise": None, "steps": len(denoising(policy).grid) - 1}
    rows = [_row(reference, task, own, None)]
    for number, options in enumerate(candidates, 1):
        rti = RealTimeIteration(policy, replace(options, jump=jump))
        tried = f"start={options.start:g} steps={options.steps} renoise={str(options.renoise).lower()}"
        label = f"{number} of {len(candidates)}: {tried}"
        result = judge(policy, environments, label, execution=Execution(RTI, asdict(rti.options), rti), **protocol)
        check_kept(result)
        kept = None if situations is None else contraction(rti, situations).mean().item()
        rows.append(_row(result, task, {name: getattr(options, name) for name in ("start", "renoise", "steps")}, kept))
    return rows, jump


def _row(result: Evaluation, task: Task, options: Row, contracted: float | None) -> Row:
    return {
        "execution": result.execution,
        **options,
        **{score: getattr(result, score)._asdict() for score in SCORES},
        "evaluations": result.network_evaluations,
        **seam_sizes(result, task.spec),
        "contraction": contracted,
    }


def _write(config: DictConfig, folder: Path, policy: Policy, rows: list[Row], choice: dict[str, Any] | None) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    told = {name: config[name] for name in ("checkpoint", "episodes", "seed", "tolerance")}
    about = {"execution_steps": policy.spec.execution_steps, "chosen": choice, "rows": rows}
    measured_on = {"machine": machine(), "versions": versions()}
    write_json(folder / "rti.json", {"command": made_by("rti"), **told, **about, **measured_on})
    title = f"real-time iteration: {config.checkpoint}, Ta = {policy.spec.execution_steps}, {config.episodes} episodes"
    plot(title, rows, choice, folder / "rti.png")
    print_rows(folder.name, [{column: row[column] for column in PRINTED} for row in rows])
    print(f"written to {folder}")


def _nothing_chosen(rows: Sequence[Row], tolerance: float, checkpoint: Path) -> str:
    reference, *tried = rows
    best = max(tried, key=lambda row: [row[score]["mean"] for score in reversed(SCORES)])
    lost = reference["max_reward"]["mean"] - best["max_reward"]["mean"]
    return (
        f"nothing that was tried keeps the score of {checkpoint}: the best, start={best['start']:g} "
        f"steps={best['steps']}, loses {lost:.3g} of the mean maximum reward, and tolerance={tolerance:g}: "
        "try other starts= or more steps="
    )


def _again(config: DictConfig) -> str:
    steps = config.horizon.execution_steps
    return "" if steps is None else f" horizon.execution_steps={steps}"


def default_out(composed: Composed) -> Path:
    """RUN/rti-EPISODESxSEED; what tells another checkpoint than the last, or another Ta, comes first."""
    config = composed.config
    checkpoint = _checkpoint(config).expanduser()
    resolve(checkpoint)
    return result_folder(checkpoint, RTI, f"{name_of(config)}{config.episodes}x{config.seed}")


main = Application(
    RTI,
    "Choose by measurement where chunks may start from the ones before, and write it to the checkpoint.",
    RtiConfig,
    run,
    default_out,
    paths=("checkpoint",),
)
