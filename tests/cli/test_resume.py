"""What may change when a run goes on, and what would make other use of its weights."""

from __future__ import annotations

from pathlib import Path

import pytest
from omegaconf import DictConfig, OmegaConf

from flowsteer.cli import finetune, train
from flowsteer.cli.application import Application
from flowsteer.cli.errors import UsageError
from flowsteer.cli.resume import resumed_config


@pytest.fixture(scope="module")
def cloning(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The config of a run, which is all that a refusal may need of it."""
    folder = tmp_path_factory.mktemp("cloning")
    options = ("dataset=x.zarr", "policy=diffusion", "data.control_hz=10")
    (folder / "config.yaml").write_text(written(train.application, *options))
    return folder


@pytest.fixture(scope="module")
def tuning(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tuning")
    (folder / "config.yaml").write_text(written(finetune.application, "task=pusht", "policy=flow"))
    return folder


def written(application: Application, *options: str) -> str:
    return OmegaConf.to_yaml(application.compose(*options))


def resume_cloning(folder: Path, *options: str) -> DictConfig:
    return resumed_config(train.application, folder, [f"resume={folder}", *options], train.FREE)


def resume_tuning(folder: Path, *options: str) -> DictConfig:
    return resumed_config(finetune.application, folder, [f"resume={folder}", *options])


@pytest.mark.parametrize(
    ("option", "was"),
    [
        ("policy.prediction=eps", '"v"'),
        ("policy.betas=linear", '"cosine"'),
        ("policy.train_steps=50", "100"),
        ("policy.relative_to=agent_position", "null"),
        ("policy.times=noisy", '"uniform"'),
        ("policy.normalizers={action: identity}", "null"),
        ("policy.network.hidden=16", "256"),
        ("policy.encoder.noise=0.5", "0.0"),
        ("horizon.execution_steps=4", "8"),
        ("data.control_hz=20", "10.0"),
        ("data.mirror=true", "false"),
        ("task.observation=keypoints", '"state"'),
    ],
)
def test_what_the_weights_were_learnt_with_stays(cloning: Path, option: str, was: str) -> None:
    key = option.partition("=")[0]
    with pytest.raises(UsageError) as refused:
        resume_cloning(cloning, option)
    assert str(refused.value) == (
        f"'{option}' cannot go with resume=: the run was made with {key}={was}; leave it out or start another run"
    )


@pytest.mark.parametrize("option", ["policy.prediction=v", "policy.normalizers=null", "data.mirror=false"])
def test_what_is_said_again_is_no_change(cloning: Path, option: str) -> None:
    assert resume_cloning(cloning, option) == resume_cloning(cloning)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("policy.steps=20", 20),
        ("policy.eta=1", 1.0),
        ("policy.solver=heun", "heun"),
        ("policy.clip=null", None),
        ("data.in_memory=false", False),
        ("train.steps=9", 9),
        ("train.lr=0.1", 0.1),
        ("sim.num_envs=2", 2),
        ("eval.episodes=3", 3),
    ],
)
def test_how_it_samples_learns_and_is_judged_may_change(cloning: Path, option: str, value: object) -> None:
    config = resume_cloning(cloning, option)
    assert OmegaConf.select(config, option.partition("=")[0]) == value


@pytest.mark.parametrize(
    "option",
    [
        *("policy.steps=20", "task.reward=none", "horizon.execution_steps=4", "checkpoint=x"),
        *("algo.steps=5", "algo.fine_tuned_steps=3", "algo.eta=0.5"),
    ],
)
def test_fine_tuning_goes_on_with_the_policy_and_the_task_that_it_began_with(tuning: Path, option: str) -> None:
    with pytest.raises(UsageError, match=r"cannot go with resume=: the run was made with "):
        resume_tuning(tuning, option)


@pytest.mark.parametrize("option", ["train.env_steps=900", "algo.clip_last=0.02", "train.lr=0.1"])
def test_fine_tuning_may_go_on_otherwise(tuning: Path, option: str) -> None:
    resume_tuning(tuning, option)
