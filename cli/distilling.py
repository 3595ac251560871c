"""A distillation run, composed from the rooms: teacher, student, demonstrations, loop, judgement beside the teacher."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from accelerate import Accelerator
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from flowsteer.cli.checks import check_not_negative, check_positive, check_seeds, find_checkpoint
from flowsteer.cli.comparison import COMPARISON, compare
from flowsteer.cli.demonstrations import Demonstrations, load_demonstrations
from flowsteer.cli.devices import find_processes
from flowsteer.cli.errors import UsageError, unknown
from flowsteer.cli.judging import make_evaluation
from flowsteer.cli.refusals import wrong_type
from flowsteer.cli.simulation import check_backend
from flowsteer.cli.training import (
    Outcome,
    check_links,
    go_on,
    loop_options,
    make_batches,
    plain,
    split_demonstrations,
)
from flowsteer.configs.train import DataOptions, Horizon
from flowsteer.policies.build import build
from flowsteer.policies.checkpoint import POLICY, load_policy, read_config, resolve
from flowsteer.policies.cloning import Cloning, Evaluate
from flowsteer.policies.consistency import make_student, make_teacher, student_config
from flowsteer.policies.denoising import DenoisingPolicy
from flowsteer.policies.policy import Policy
from flowsteer.policies.random_state import seed_everything
from flowsteer.sim.tasks.base import Task

TEACHER = "teacher"
"""In a checkpoint: which policy the student learnt from."""


@final
@dataclass(frozen=True)
class Lesson:
    """What is distilled.

    Attributes:
        folder: the teacher's checkpoint.
        teacher: as it teaches.
        policy: its "policy" in the checkpoint.
        task: that it is for, None for a real robot's.
        source: dataset, data, task, horizon and seed of the demonstrations, as `flowsteer train` has them.
    """

    folder: Path
    teacher: DenoisingPolicy
    policy: dict[str, Any]
    task: Task | None
    source: DictConfig


def distill_policy(config: DictConfig, folder: Path) -> Outcome:
    """Run or go on with the run in `folder`, which then holds checkpoints, metrics, plots, videos and a comparison.

    Args:
        config: resolved, see `flowsteer.configs.distill.DistillConfig`; run folders in it become checkpoints.
        folder: made if it does not exist.

    Raises:
        UsageError, DataError, PolicyError, SimError: bad input; nothing has been written then.
    """
    check_seeds(config, "seed", "eval.seed")
    check_positive(config, "eval.episodes", "steps", "teacher_steps")
    check_not_negative(config, "eval.videos", "eval.delay_steps")
    check_backend(config.sim)
    seed_everything(config.seed)
    accelerator = find_processes(config.device)
    check_links(folder)
    lesson = _lesson(config)
    if (folder / "last").exists():
        _check_teacher(lesson, folder)
    with ExitStack() as stack:
        evaluate = _evaluate(config, lesson, folder, accelerator, stack)
        cloning, outcome = _train(config, lesson, folder, evaluate, accelerator, stack)
    learnt = outcome.step > outcome.start or not (folder / COMPARISON).exists()
    if outcome.finished and learnt and lesson.task is not None and accelerator.is_main_process:
        contenders = _contenders(config, lesson, cloning.ema.average, accelerator)
        compare(contenders, lesson.task, config, folder, accelerator.device)
    return outcome


def _lesson(config: DictConfig) -> Lesson:
    folder = resolve(find_checkpoint(config))
    # The last checkpoint of a run may be another one when this run goes on.
    config.checkpoint = str(folder)
    stored = read_config(folder)
    teacher = make_teacher(load_policy(folder, weights=config.weights), config.teacher_steps)
    source = _source(config, stored, teacher)
    task = None if source.task is None else build(source.task)
    return Lesson(folder, teacher, stored["policy"], task, source)


def _source(config: DictConfig, stored: Mapping[str, Any], teacher: DenoisingPolicy) -> DictConfig:
    """Where the observations to learn at come from.

    Raises:
        UsageError: the teacher's run does not tell, or an option of the data is unknown or of another type.
    """
    origin = _cloned_from(stored)
    dataset = config.dataset or origin.get("dataset")
    if dataset is None:
        raise UsageError(f"{config.checkpoint} does not tell of any demonstrations: name them with dataset=")
    if config.dataset is None and Path(dataset).is_absolute() and not Path(dataset).exists():
        raise UsageError(f"{dataset}, which the teacher was cloned from, is gone: name where it is now with dataset=")
    horizon = {name: getattr(teacher.spec, name) for name in vars(Horizon())}
    data = _data_options(origin.get("data", {}), config.data)
    known = {"dataset": dataset, "data": data, "task": stored.get("task"), "horizon": horizon}
    return OmegaConf.create({**known, "seed": origin.get("seed", config.seed)})


def _cloned_from(stored: Mapping[str, Any]) -> Mapping[str, Any]:
    """The config that names the demonstrations: the policy's own, or of the one that it was fine-tuned from."""
    while "dataset" not in stored:
        checkpoint = stored.get("finetune", {}).get("checkpoint")
        if checkpoint is None or not Path(checkpoint).exists():
            return {}
        stored = read_config(Path(checkpoint))
    return stored


def _data_options(known: Mapping[str, Any], told: DictConfig) -> DictConfig:
    options = OmegaConf.structured(DataOptions)
    strange = [str(key) for key in told if key not in options]
    if strange:
        raise unknown("option of data", strange[0], map(str, options))
    try:
        return OmegaConf.merge(options, known, told)  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        raise UsageError(wrong_type(error)) from None


def _check_teacher(lesson: Lesson, folder: Path) -> None:
    """Refuse to go on with another teacher than the one that the run in `folder` began with."""
    began = read_config(folder).get(TEACHER, {})
    if began.get("sha256") != _digest(lesson.folder):
        raise UsageError(
            f"checkpoint={lesson.folder} is not the teacher that this run began with: "
            f"name it where it is now (it was {began.get('checkpoint')})"
        )


def _digest(folder: Path) -> str:
    with (folder / POLICY).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _evaluate(
    config: DictConfig, lesson: Lesson, folder: Path, accelerator: Accelerator, stack: ExitStack
) -> Evaluate | None:
    if not config.train.evaluate_every:
        return None
    if lesson.task is None:
        raise UsageError("the teacher was trained without a task to evaluate in: set train.evaluate_every=0")
    return make_evaluation(config, lesson.task, lesson.teacher.spec.observation_steps, folder, accelerator, stack)


def _train(
    config: DictConfig,
    lesson: Lesson,
    folder: Path,
    evaluate: Evaluate | None,
    accelerator: Accelerator,
    stack: ExitStack,
) -> tuple[Cloning, Outcome]:
    policy = student_config(lesson.teacher, lesson.policy, config.steps)
    student, loss = make_student(lesson.teacher, policy), build(config.loss)
    demonstrations, train, val = split_demonstrations(lesson.source, _demonstrations(lesson), lesson.task)
    batches, validation = make_batches(config, demonstrations, train, val, accelerator, stack)
    cloning = Cloning(
        student,
        loop_options(config),
        batches,
        config.train.batch_size,
        seed=config.seed,
        accelerator=accelerator,
        folder=folder,
        describe={
            **plain(lesson.source),
            "policy": policy,
            "spec": student.spec.to_dict(),
            TEACHER: {"checkpoint": str(lesson.folder), "sha256": _digest(lesson.folder)},
            "distill": plain(config),
        },
        objective=lambda student, average: loss(student, average, lesson.teacher),
    )
    return cloning, go_on(cloning, config, folder, validation, evaluate, stack)


def _demonstrations(lesson: Lesson) -> Demonstrations:
    """What the teacher was cloned from, or fits it as well."""
    demonstrations = load_demonstrations(lesson.source, lesson.task)
    spec = demonstrations.spec
    lesson.teacher.spec.check(spec.observations, spec.action_dim, spec.control_hz, f"dataset {lesson.source.dataset}")
    return demonstrations


def _contenders(config: DictConfig, lesson: Lesson, student: Policy, accelerator: Accelerator) -> dict[str, Policy]:
    """The student, its teacher as it is deployed and as it taught, and the teacher at the student's steps."""

    def load() -> Policy:
        return load_policy(lesson.folder, accelerator.device, config.weights)

    deployed, taught, few = load(), lesson.teacher, make_teacher(load(), config.steps)
    contenders = {f"teacher, {_steps(deployed)}": deployed}
    contenders.setdefault(f"teacher, {_steps(taught)}", taught)
    contenders.setdefault(f"teacher, {_steps(few)}", few)
    return {**contenders, f"student, {_steps(student)}": student}


def _steps(policy: Policy) -> str:
    assert isinstance(policy, DenoisingPolicy)
    noise = f", eta = {policy.eta:g}" if policy.eta else ""
    return f"K = {len(policy.grid) - 1}{noise}"
