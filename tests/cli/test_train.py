from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from safetensors.torch import load_file

from flowsteer.cli.main import main
from flowsteer.cli.resume import resumed_config
from flowsteer.cli.run_log import read_metrics
from flowsteer.cli.train import application
from flowsteer.datasets import ReplayBuffer, write_zarr
from flowsteer.datasets.opening import open_dataset
from flowsteer.policies.checkpoint import load_policy
from flowsteer.sim.tasks.pusht import PushT
from flowsteer.sim.tasks.pusht_symmetry import in_hindsight

FLOWSTEER = Path(sys.executable).with_name("flowsteer")


def weights(run: Path) -> dict[str, list[float]]:
    return {name: tensor.flatten().tolist() for name, tensor in load_file(run / "last" / "policy.safetensors").items()}


def steps_logged(run: Path) -> list[int]:
    return [row["step"] for row in read_metrics(run / "metrics.jsonl")]


def error_of(capsys: pytest.CaptureFixture[str], *args: str, code: int = 2) -> str:
    capsys.readouterr()
    assert main(["train", *args]) == code
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1, captured.err
    assert captured.err.startswith("error: "), captured.err
    return captured.err.removeprefix("error: ").rstrip("\n")


def test_a_run_leaves_everything_that_the_documentation_promises(trained: Path, dataset: Path) -> None:
    present = set(os.listdir(trained))
    assert {"checkpoints", "last", "best", "config.yaml", "metrics.jsonl", "loss.png", "success.png"} <= present
    assert any(name.startswith("events.out.tfevents") for name in present)
    rows = read_metrics(trained / "metrics.jsonl")
    assert [row["step"] for row in rows if "train/loss" in row] == [2, 4]
    assert [row["step"] for row in rows if "val/loss" in row] == [2, 4]
    assert [row["step"] for row in rows if "eval/success" in row] == [4]
    judged = trained / "evaluations" / "00000004"
    assert json.loads((judged / "eval.json").read_text())["episodes"] == 2
    config = yaml.safe_load((trained / "config.yaml").read_text())
    assert config["dataset"] == str(dataset)
    assert config["train"]["steps"] == 4
    stored = yaml.safe_load((trained / "last" / "config.yaml").read_text())
    assert stored["spec"]["observations"]["block_pose"]["shape"] == [4]
    assert stored["task"]["_target_"] == "flowsteer.sim.tasks.pusht.PushT"


def test_a_folder_that_holds_a_run_is_refused(
    trained: Path, dataset: Path, capsys: pytest.CaptureFixture[str], tiny: tuple[str, ...]
) -> None:
    before = weights(trained)
    message = error_of(capsys, f"dataset={dataset}", f"out={trained}", *tiny)
    assert message == f"{trained} already holds a run: continue it with resume={trained} or choose another out="
    assert weights(trained) == before


def test_nothing_depends_on_the_working_directory(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny: tuple[str, ...]
) -> None:
    monkeypatch.chdir(tmp_path)
    relative = os.path.relpath(dataset, tmp_path)
    assert main(["train", f"dataset={relative}", *tiny, "train.steps=2"]) == 0
    (run,) = (tmp_path / "runs").iterdir()
    assert run.name.startswith("pusht-flow-")
    monkeypatch.chdir("/")
    assert main(["train", f"resume={run}", "train.steps=4"]) == 0
    assert steps_logged(run) == [2, 4]


def wait_for(condition: Path, process: subprocess.Popen[str], timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


LONG = ("train.steps=200", "train.save_every=20")


@pytest.fixture(scope="module")
def whole(dataset: Path, tiny: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 200 steps that nothing disturbed."""
    run = tmp_path_factory.mktemp("runs") / "whole"
    assert main(["train", f"dataset={dataset}", *tiny, *LONG, f"out={run}"]) == 0
    return run


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_run_that_a_signal_ended_resumes_to_the_same_weights(
    number: signal.Signals,
    dataset: Path,
    whole: Path,
    tmp_path: Path,
    environment: dict[str, str],
    tiny: tuple[str, ...],
) -> None:
    run = tmp_path / "run"
    command = [str(FLOWSTEER), "train", f"dataset={dataset}", *tiny, *LONG, f"out={run}"]
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        wait_for(run / "last", process)
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
    if number == signal.SIGKILL:
        assert process.returncode == -signal.SIGKILL
    else:
        assert process.returncode == 130
        assert err.splitlines()[-1].startswith("stopped at step ")
        assert err.splitlines()[-1].endswith(f"; go on with: flowsteer train resume={run}")
    assert max(steps_logged(run), default=0) < 200
    assert main(["train", f"resume={run}"]) == 0
    assert weights(run) == weights(whole)
    assert steps_logged(run) == steps_logged(whole)
    assert [path.name for path in run.iterdir() if path.name.startswith(".")] == []


def test_resuming_refuses_what_would_make_it_another_run(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = weights(trained)

    def refused(option: str, code: int = 2) -> str:
        return error_of(capsys, f"resume={trained}", option, code=code)

    assert refused("train.step=9") == "no option 'train.step'; nearest: train.steps"
    assert refused("policy=diffusion").startswith("'policy' cannot be chosen anew when resuming")
    assert refused("train.steps=many") == (
        "option 'train.steps': value 'many' of type 'str' could not be converted to Integer"
    )
    assert refused("train.lr=1,2") == "'train.lr=1,2' sweeps, but resume= continues one run"
    assert refused("-m") == "'-m' cannot go with resume=; only option=value can"
    assert refused("train.lr=[").startswith("'train.lr=[' is malformed")
    assert refused("seed=1", code=1).startswith("cannot resume: 'seed' was 0 and is 1")
    assert weights(trained) == before


def test_resuming_what_is_not_a_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert error_of(capsys, f"resume={tmp_path}") == (
        f"resume={tmp_path} holds no run (config.yaml is missing): name a folder made with out="
    )
    for text in ("train: {steps: many}", "- a list", "{"):
        (tmp_path / "config.yaml").write_text(text)
        assert error_of(capsys, f"resume={tmp_path}").startswith(
            f"{tmp_path / 'config.yaml'} is not the config of a run"
        )
    (tmp_path / "config.yaml").write_text("unknown: 1")
    assert error_of(capsys, f"resume={tmp_path}") == (
        f"resume={tmp_path} holds no run of flowsteer train (Key 'unknown' not in 'TrainConfig'): "
        "go on with the subcommand that made it"
    )


def test_a_sweep_trains_every_combination(dataset: Path, tmp_path: Path, tiny: tuple[str, ...]) -> None:
    # Of the small network's options only those fit that every swept policy has.
    options = [option for option in tiny if not option.startswith("policy.network")]
    sweep = ["-m", "policy=flow,gaussian", "train.steps=2", f"dataset={dataset}", f"out={tmp_path / 'all'}"]
    assert main(["train", *sweep, *options, "train.lr=1e-3"]) == 0
    for policy in ("flow", "gaussian"):
        assert (tmp_path / "all" / f"policy={policy}" / "last" / "policy.safetensors").is_file()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["dataset=null"], "dataset= is missing: name a zarr store, an HDF5 file, a LeRobot folder or minari:ID"),
        (["dataset=/nowhere"], "/nowhere: no such file or folder"),
        (["task=hopper"], "{dataset} has 2 action dimensions, task 'hopper' has 3"),
        (["+data.names.block_pose=stat"], "{dataset}: there is no key 'stat': did you mean 'state'?"),
        (
            ["+data.names.stat=state"],
            "data.names.stat names no observation of the task; it has agent_position, block_pose",
        ),
        (
            ["+data.names.block_pose=keypoint"],
            "{dataset}: observation 'block_pose' is float64 [9, 2], the task's is float32 [4]",
        ),
        (["task=pusht_image"], "{dataset}: there is no key 'img'"),
        (["task=none"], "data.observations is empty: with task=none it lists the keys that the policy sees"),
        (["task=none", "data.observations=[state]"], "{dataset} does not tell its control rate: set data.control_hz"),
        (["task=robomimic"], "{dataset} does not hold env_args: choose its task by name"),
        (["policy.solver=huen"], "solver 'huen' is unknown; nearest: heun (known: dpm_solver_2m, heun, transition)"),
        (["task.observation=stat"], "pusht: observation 'stat' is unknown, choose one of"),
        (["horizon.execution_steps=16"], "observation_steps - 1 + execution_steps must not exceed prediction_steps"),
        (["train.lr=0"], "train.lr must be positive, got 0"),
        (["data.val_fraction=1"], "val_fraction must be at least 0 and below 1, got 1.0"),
        (["train.batch_size=0"], "batch_size 0 must be"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    options: list[str],
    message: str,
    dataset: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    tiny: tuple[str, ...],
) -> None:
    run = tmp_path / "deep" / "run"
    args = [f"dataset={dataset}", f"out={run}", "train.steps=2", *tiny, *options]
    told = error_of(capsys, *args, code=1)
    assert told.startswith(message.format(dataset=dataset)), told
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("seed=-1", "seed must be from 0 to 4294967295, got -1"),
        ("seed=4294967296", "seed must be from 0 to 4294967295, got 4294967296"),
        ("eval.seed=-1", "eval.seed must be from 0 to 4294967295, got -1"),
        ("eval.episodes=0", "eval.episodes must be positive, got 0"),
        ("eval.delay_steps=-1", "eval.delay_steps must not be negative, got -1"),
    ],
)
def test_a_number_out_of_range_is_refused_before_anything_is_made(
    option: str, message: str, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], tiny: tuple[str, ...]
) -> None:
    assert error_of(capsys, f"dataset={dataset}", f"out={tmp_path / 'run'}", *tiny, option) == message
    assert list(tmp_path.iterdir()) == []


def test_a_data_set_given_anew_when_resuming_means_the_working_directory(
    trained: Path, dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(dataset.parent)
    config = resumed_config(application, trained, [f"resume={trained}", f"dataset={dataset.name}"])
    assert config.dataset == str(dataset)
    assert resumed_config(application, trained, ["dataset=minari:a/b-v0"]).dataset == "minari:a/b-v0"


def test_a_recorded_state_that_is_another_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], tiny: tuple[str, ...]
) -> None:
    store = write_zarr(
        ReplayBuffer({"state": np.zeros((20, 2)), "action": np.zeros((20, 2))}, np.array([20])), tmp_path / "other.zarr"
    )
    told = error_of(capsys, f"dataset={store}", f"out={tmp_path / 'run'}", *tiny, code=1)
    assert told.startswith(f"{store}: 'state' of shape [20, 2] is not what the task reads from it: give the obs"), told


def test_a_real_robots_demonstrations_train_without_a_task(
    dataset: Path, tmp_path: Path, tiny: tuple[str, ...]
) -> None:
    options = ["task=none", "data.observations=[state]", "data.control_hz=10", "train.steps=2"]
    assert main(["train", f"dataset={dataset}", f"out={tmp_path / 'run'}", *tiny, *options]) == 0
    stored = yaml.safe_load((tmp_path / "run" / "last" / "config.yaml").read_text())
    assert stored["task"] is None
    assert stored["spec"]["control_hz"] == 10.0


def test_observations_come_from_where_the_public_demonstrations_keep_them(
    dataset: Path, tmp_path: Path, tiny: tuple[str, ...]
) -> None:
    run = tmp_path / "run"
    assert main(["train", f"dataset={dataset}", f"out={run}", *tiny, "task=pusht_keypoints", "train.steps=2"]) == 0
    state = open_dataset(dataset, keys=["state"]).data["state"]
    stored = load_file(run / "last" / "policy.safetensors")
    # The task's agent_position is the first two columns of the data set's state; the others are not seen.
    episodes = np.ones(6, bool)
    episodes[np.random.default_rng(0).permutation(6)[:1]] = False
    seen = state[np.repeat(episodes, 20), :2]
    scale = 2 / (seen.max(axis=0) - seen.min(axis=0))
    assert stored["ema.normalizer.scale:agent_position"].numpy() == pytest.approx(scale, rel=1e-5)
    assert stored["ema.normalizer.scale:keypoint"].shape == (18,)


def test_mirror_images_train_as_well_and_do_not_validate(dataset: Path, tmp_path: Path, tiny: tuple[str, ...]) -> None:
    options = ["data.mirror=true", "train.steps=2", "train.validate_every=2", "train.batch_size=8"]
    assert main(["train", f"dataset={dataset}", f"out={tmp_path / 'run'}", *tiny, *options]) == 0
    state = open_dataset(dataset, keys=["state"]).data["state"]
    validates = np.random.default_rng(0).permutation(6)[0]
    seen = np.delete(state, np.s_[20 * validates : 20 * (validates + 1)], axis=0)
    both = np.concatenate([seen[:, :2], 512 - seen[:, 1::-1]])
    stored = load_file(tmp_path / "run" / "last" / "policy.safetensors")
    scale = 2 / (both.max(axis=0) - both.min(axis=0))
    assert stored["ema.normalizer.scale:agent_position"].numpy() == pytest.approx(scale, rel=1e-5)


def test_the_normaliser_of_relative_actions_knows_how_far_they_lead(
    dataset: Path, tmp_path: Path, tiny: tuple[str, ...]
) -> None:
    options = ["policy.relative_to=agent_position", "train.steps=2", "horizon.observation_steps=1"]
    assert main(["train", f"dataset={dataset}", f"out={tmp_path / 'run'}", *tiny, *options]) == 0
    data = open_dataset(dataset, keys=["state", "action"]).data
    validates = np.random.default_rng(0).permutation(6)[0]
    starts = [20 * e + i for e in range(6) if e != validates for i in range(12)]
    # 16 steps from each frame on, the last one repeated: of an episode of 20, so that 7 are repeated at most.
    steps = [[min(start + k, start // 20 * 20 + 19) for k in range(16)] for start in starts]
    far = data["action"][steps] - data["state"][starts, None, :2]
    stored = load_file(tmp_path / "run" / "last" / "policy.safetensors")
    scale = 2 / (far.max(axis=(0, 1)) - far.min(axis=(0, 1)))
    assert stored["ema.normalizer.scale:action"].numpy() == pytest.approx(scale, rel=1e-5)


def test_hindsight_moves_all_episodes_before_anything_is_learnt_from_them(
    dataset: Path, tmp_path: Path, tiny: tuple[str, ...]
) -> None:
    options = ["data.hindsight=true", "data.val_fraction=0", "train.steps=2"]
    assert main(["train", f"dataset={dataset}", f"out={tmp_path / 'run'}", *tiny, *options]) == 0
    buffer = open_dataset(dataset, keys=["state", "action"])
    arrays = {key: stored.read(buffer.data["state"]) for key, stored in PushT().dataset_keys.items() if stored.read}
    moved = in_hindsight({**arrays, "action": buffer.data["action"]}, buffer.episode_ends)
    stored = load_file(tmp_path / "run" / "last" / "policy.safetensors")
    for key in ("agent_position", "action"):
        scale = 2 / (moved[key].max(axis=0) - moved[key].min(axis=0))
        assert stored[f"ema.normalizer.scale:{key}"].numpy() == pytest.approx(scale, rel=1e-4)


@pytest.mark.parametrize(
    ("option", "reason"),
    [
        ("mirror", "knows no mirror image of its observations"),
        ("hindsight", "cannot move its goal in what it observes"),
    ],
)
def test_a_task_that_knows_no_other_demonstrations_refuses_them(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], tiny: tuple[str, ...], option: str, reason: str
) -> None:
    options = ["task=pusht_keypoints", f"data.{option}=true"]
    told = error_of(capsys, f"dataset={dataset}", f"out={tmp_path / 'run'}", *tiny, *options, code=1)
    assert told == f"data.{option}=true: task 'pusht_keypoints' {reason}"
    assert not (tmp_path / "run").exists()


def test_images_that_are_mirrored_must_be_in_memory(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], tiny: tuple[str, ...]
) -> None:
    frames = {"img": np.zeros((40, 96, 96, 3), np.uint8), "state": np.ones((40, 5)), "action": np.ones((40, 2))}
    images = write_zarr(ReplayBuffer(frames, np.array([20, 40])), tmp_path / "images.zarr")
    options = ["task=pusht_image", "data.mirror=true", "data.in_memory=false"]
    told = error_of(capsys, f"dataset={images}", f"out={tmp_path / 'run'}", *tiny, *options, code=1)
    assert told == "data.mirror=true turns all frames over in memory: set data.in_memory=true"
    assert not (tmp_path / "run").exists()


def test_evaluation_needs_a_task(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], tiny: tuple[str, ...]
) -> None:
    options = ["task=none", "data.observations=[state]", "data.control_hz=10", "train.evaluate_every=1"]
    told = error_of(capsys, f"dataset={dataset}", f"out={tmp_path / 'run'}", *tiny, *options)
    assert told == "there is nothing to evaluate in: choose a task or set train.evaluate_every=0"


def test_a_full_disk_is_one_line_and_nothing_half_written_stays(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], tiny: tuple[str, ...]
) -> None:
    """A limit on the size of files stands for the full disk: the log fits, the checkpoint does not."""
    run = tmp_path / "run"
    options = [f"dataset={dataset}", f"out={run}", *tiny, "train.steps=2", "policy.network.hidden=128"]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))
    try:
        told = error_of(capsys, *options, code=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "File too large" in told
    assert str(run) in told
    assert not (run / "last").exists()
    assert list((run / "checkpoints").iterdir()) == []


def test_observations_keep_the_names_that_lerobot_gives_them(tmp_path: Path, tiny: tuple[str, ...]) -> None:
    rng = np.random.default_rng(0)
    data = {"observation.state": rng.normal(size=(40, 3)), "action": rng.normal(size=(40, 2))}
    demonstrations = write_zarr(ReplayBuffer(data, np.array([20, 40])), tmp_path / "arm.zarr")
    options = ["task=none", "data.observations=[observation.state]", "data.control_hz=30", "train.steps=2"]
    assert main(["train", f"dataset={demonstrations}", f"out={tmp_path / 'run'}", *tiny, *options]) == 0
    policy = load_policy(tmp_path / "run")
    assert list(policy.spec.observations) == ["observation.state"]
    assert policy.normalizer.scale("observation.state").isfinite().all()
