"""`flowsteer distill`: what a run leaves, that it goes on exactly, what works on its student, and what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from flowsteer.cli.main import main
from flowsteer.cli.run_log import read_metrics
from flowsteer.datasets.replay_buffer import ReplayBuffer
from flowsteer.datasets.zarr_store import write_zarr
from flowsteer.policies.checkpoint import load_policy, read_tensors
from flowsteer.policies.consistency import ConsistencyPolicy

SHORT = (
    "train.steps=4",
    "train.batch_size=8",
    "train.log_every=2",
    "train.warmup_steps=2",
    "train.precision=float32",
    "train.evaluate_every=0",
    "train.validate_every=0",
    "eval.episodes=1",
    "eval.videos=0",
    "sim.workers=0",
    "device=cpu",
)

pytestmark = pytest.mark.usefixtures("short_episodes")


def distill(*args: object) -> int:
    return main(["distill", *map(str, args)])


def refused(capsys: pytest.CaptureFixture[str], *args: object, code: int) -> str:
    capsys.readouterr()
    assert distill(*args) == code
    told = capsys.readouterr().err
    assert told.count("\n") == 1, told
    return told.removeprefix("error: ").rstrip("\n")


@pytest.fixture(scope="module")
def distilled(short_episodes: None, trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A one-step student, judged on the way and at the end."""
    folder = tmp_path_factory.mktemp("distilled") / "run"
    judged = ("train.evaluate_every=4", "train.validate_every=2")
    assert distill(f"checkpoint={trained}", *SHORT, *judged, f"out={folder}") == 0
    return folder


@pytest.fixture(scope="module")
def tuned(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What fine-tuning would write with its first step: a network of two stages, noise in every step."""
    folder = tmp_path_factory.mktemp("tuned") / "run"
    options = ("train.env_steps=1", "train.decisions=2", "train.epochs=1", "train.batch_size=64", "critic.hidden=[8]")
    quick = ("algo.fine_tuned_steps=3", "train.evaluate_every=0", "sim.num_envs=2", "sim.workers=0", "device=cpu")
    assert main(["finetune", f"checkpoint={trained}", *options, *quick, f"out={folder}"]) == 0
    return folder


def test_a_run_leaves_what_the_documentation_promises(
    distilled: Path, trained: Path, dataset: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = read_metrics(distilled / "metrics.jsonl")
    assert [row["step"] for row in rows if "train/loss" in row] == [2, 4]
    assert [row["step"] for row in rows if "val/loss" in row] == [2, 4]
    assert [row["step"] for row in rows if "eval/success" in row] == [4]
    compared = json.loads((distilled / "comparison.json").read_text())
    assert list(compared["policies"]) == ["teacher, K = 10", "teacher, K = 1", "student, K = 1"]
    assert (compared["task"], compared["episodes"], compared["seed"]) == ("pusht", 1, 1_000_000)
    for result in compared["policies"].values():
        assert {"success", "max_reward", "return", "decision_ms"} <= set(result)
    stored = yaml.safe_load((distilled / "last" / "config.yaml").read_text())
    assert stored["dataset"] == str(dataset)
    assert stored["teacher"]["checkpoint"] == str((trained / "last").resolve())
    for name in ("comparison.png", "loss.png", "success.png", "config.yaml", "best"):
        assert (distilled / name).exists(), name


def test_the_teachers_encoder_and_normaliser_are_the_students(distilled: Path, trained: Path) -> None:
    student, teacher = load_policy(distilled), load_policy(trained)
    assert type(student) is ConsistencyPolicy
    assert len(student.grid) == 2
    for name, buffer in teacher.normalizer.named_buffers():
        assert buffer.equal(student.normalizer.get_buffer(name))
    learnt = zip(student.network.parameters(), teacher.network.parameters(), strict=True)
    assert not all(own.equal(taught) for own, taught in learnt)


def test_a_run_that_was_stopped_equals_one_that_went_on(trained: Path, tmp_path: Path) -> None:
    options = (f"checkpoint={trained}", "loss=both", "steps=2", *SHORT, "train.save_every=2")
    assert distill(*options, f"out={tmp_path / 'whole'}") == 0
    # The learning rate falls until the last step: both know of four.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("flowsteer.policies.cloning.Cloning._stopped", lambda self, stop: self.progress.step == 2)
        assert distill(*options, f"out={tmp_path / 'part'}") == 130
    # The teacher may have moved.
    moved = shutil.copytree((trained / "last").resolve(), tmp_path / "moved")
    assert distill(f"resume={tmp_path / 'part'}", f"checkpoint={moved}") == 0
    for file in ("policy.safetensors", "trainer.safetensors"):
        one, other = (read_tensors(tmp_path / run / "last" / file) for run in ("whole", "part"))
        assert all(one[key].equal(other[key]) for key in one)


def test_a_finished_run_is_left_as_it_is(distilled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written = (distilled / "comparison.json").stat().st_mtime_ns
    assert distill(f"resume={distilled}") == 0
    assert (distilled / "comparison.json").stat().st_mtime_ns == written
    assert capsys.readouterr().out.endswith(
        f"{distilled}: 4 steps done, nothing was left to learn (more: train.steps=); "
        f"judge it with: flowsteer eval checkpoint={distilled}\n"
    )
    (distilled / "comparison.json").unlink()
    assert distill(f"resume={distilled}") == 0
    assert (distilled / "comparison.json").exists()


def test_a_fine_tuned_teacher_is_distilled_without_its_noise(tuned: Path, dataset: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert distill(f"checkpoint={tuned}", "steps=2", "teacher_steps=5", *SHORT, f"out={folder}") == 0
    names = list(json.loads((folder / "comparison.json").read_text())["policies"])
    assert names == ["teacher, K = 10, eta = 1", "teacher, K = 5", "teacher, K = 2", "student, K = 2"]
    # The demonstrations are those of the policy that was fine-tuned.
    assert yaml.safe_load((folder / "last" / "config.yaml").read_text())["dataset"] == str(dataset)
    student = load_policy(folder)
    observed = {key: torch.zeros(1, 2, *array.shape) for key, array in student.spec.observations.items()}
    noise = torch.randn(1, 16, 2)
    assert student.act(observed, noise=noise).equal(student.act(observed, noise=noise))


def test_a_student_is_judged_and_fine_tuned(distilled: Path, tmp_path: Path) -> None:
    judged = ["eval", f"checkpoint={distilled}", "episodes=1", "eval.videos=0", "sim.workers=0"]
    assert main([*judged, f"out={tmp_path / 'judged'}"]) == 0
    quick = ["train.env_steps=1", "train.decisions=2", "train.epochs=1", "train.batch_size=64", "critic.hidden=[8]"]
    quick += ["train.evaluate_every=0", "sim.num_envs=2", "sim.workers=0", "device=cpu", f"out={tmp_path / 'tuned'}"]
    assert main(["finetune", f"checkpoint={distilled}", "algo.fine_tuned_steps=1", *quick]) == 0
    assert type(load_policy(tmp_path / "tuned")) is ConsistencyPolicy


def test_what_cannot_be_done_with_a_student(
    distilled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = f"out={tmp_path / 'run'}"
    told = refused(capsys, f"checkpoint={distilled}", *SHORT, out, code=1)
    assert told == "ConsistencyPolicy cannot be distilled: name a diffusion or flow policy"
    assert main(["export", f"checkpoint={distilled}", "steps=4", f"out={tmp_path / 'policy.onnx'}"]) == 1
    assert "this policy was distilled to 1, distill another one with steps=4" in capsys.readouterr().err
    assert main(["finetune", f"checkpoint={distilled}", "algo=fpo", "sim.workers=0", "device=cpu", out]) == 1
    assert "algo=fpo needs a denoising loss, which a ConsistencyPolicy has not" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Demonstrations of a task with other observations."""
    data = {"joints": np.zeros((40, 7)), "action": np.zeros((40, 2))}
    return write_zarr(ReplayBuffer(data, np.array([20, 40])), tmp_path_factory.mktemp("foreign") / "arm.zarr")


def test_bad_input_is_one_line_and_leaves_nothing(
    trained: Path, foreign: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cases: list[tuple[tuple[str, ...], int, str]] = [
        (("checkpoint=null",), 2, "checkpoint= is missing: name a run folder"),
        (("weights=eam",), 2, "weights 'eam' is unknown; nearest: ema"),
        (("steps=0",), 2, "steps must be positive, got 0"),
        (("steps=5",), 1, "steps must be from 1 to 4 in a consistency policy, got 5"),
        (("steps=3", "teacher_steps=2"), 1, "a student of steps=3 has nothing to learn from a teacher of 2"),
        (("teacher_steps=0",), 2, "teacher_steps must be positive, got 0"),
        (("loss=same_nose",), 2, "loss 'same_nose' is unknown; nearest: same_noise (known: both, consistency, same"),
        (("loss.same_noise=0",), 1, "loss.same_noise and loss.consistency are both 0"),
        ((f"dataset={foreign}",), 1, f"{foreign}"),
        ((f"dataset={tmp_path}/none.zarr",), 1, f"{tmp_path}/none.zarr: no such file or folder"),
        (("+data.mirrored=true",), 2, "option of data 'mirrored' is unknown; nearest: mirror"),
        (("+data.val_fraction=many",), 2, "option 'val_fraction': value 'many'"),
        (("train.lr=-1",), 1, "train.lr must be positive, got -1"),
        (("eval.episodes=0",), 2, "eval.episodes must be positive, got 0"),
        (("step=1",), 2, "no option 'step'; nearest: steps"),
        ((f"checkpoint={tmp_path}/none",), 1, f"checkpoint {tmp_path}/none does not exist"),
    ]
    for args, code, message in cases:
        named = () if args[0].startswith("checkpoint=") else (f"checkpoint={trained}",)
        told = refused(capsys, *named, *SHORT, *args, f"out={tmp_path / 'run'}", code=code)
        assert told.startswith(message), told
        assert list(tmp_path.iterdir()) == []


def test_a_gaussian_policy_is_no_teacher(
    dataset: Path, tmp_path: Path, tiny: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    options = [option for option in tiny if "network" not in option]
    run = tmp_path / "gaussian"
    assert main(["train", f"dataset={dataset}", "policy=gaussian", "train.steps=1", f"out={run}", *options]) == 0
    told = refused(capsys, f"checkpoint={run}", *SHORT, f"out={tmp_path / 'run'}", code=1)
    assert told == "GaussianPolicy cannot be distilled: name a diffusion or flow policy"


def test_demonstrations_that_nobody_tells_of(tuned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lost = shutil.copytree((tuned / "last").resolve(), tmp_path / "lost")
    config = yaml.safe_load((lost / "config.yaml").read_text())
    config["finetune"]["checkpoint"] = str(tmp_path / "gone")
    (lost / "config.yaml").write_text(yaml.safe_dump(config))
    told = refused(capsys, f"checkpoint={lost}", *SHORT, f"out={tmp_path / 'run'}", code=2)
    assert told == f"{lost} does not tell of any demonstrations: name them with dataset="
    config["dataset"] = str(tmp_path / "moved.zarr")
    (lost / "config.yaml").write_text(yaml.safe_dump(config))
    told = refused(capsys, f"checkpoint={lost}", *SHORT, f"out={tmp_path / 'run'}", code=2)
    assert (
        told == f"{tmp_path}/moved.zarr, which the teacher was cloned from, is gone: name where it is now with dataset="
    )


def test_a_run_goes_on_with_its_own_teacher(
    distilled: Path, tuned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = refused(capsys, f"resume={distilled}", f"checkpoint={tuned}", code=2)
    assert "is not the teacher that this run began with: name it where it is now (it was" in told
    told = refused(capsys, f"resume={distilled}", "steps=2", code=2)
    assert told.startswith("'steps=2' cannot go with resume=: the run was made with steps=1")
    told = refused(capsys, f"checkpoint={tuned}", *SHORT, f"out={distilled}", code=2)
    assert told == f"{distilled} already holds a run: continue it with resume={distilled} or choose another out="
