import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from flowsteer.cli import finetuning
from flowsteer.cli.main import main
from flowsteer.policies.checkpoint import load_policy, read_tensors
from flowsteer.policies.networks.staged import StagedNetwork
from flowsteer.sim.errors import SimError

SHORT = (
    "train.env_steps=300",
    "train.decisions=8",
    "train.epochs=1",
    "train.batch_size=64",
    "train.critic_batch_size=32",
    "train.save_every=2",
    "train.evaluate_every=0",
    "critic.hidden=[16]",
    "sim.num_envs=4",
    "sim.workers=0",
    "device=cpu",
)
SMALL = ("horizon.observation_steps=1", "horizon.prediction_steps=4", "horizon.execution_steps=4", "eval.videos=0")
HOPPER = ("task=hopper", "sim.backend=gym", *SMALL)

pytestmark = pytest.mark.usefixtures("short_episodes")


def finetune(*args):
    return main(["finetune", *map(str, args)])


def refused(capsys, *args, code):
    assert finetune(*args) == code
    captured = capsys.readouterr().err.strip().splitlines()
    assert len(captured) == 1, captured
    return captured[0].removeprefix("error: ")


@pytest.fixture(scope="module")
def tuned(short_episodes, trained, tmp_path_factory):
    """A run on a cloned policy, judged before and after."""
    folder = tmp_path_factory.mktemp("finetuned") / "run"
    judged = ("train.evaluate_every=100", "eval.episodes=2", "eval.videos=1")
    options = ("algo.fine_tuned_steps=3", *SHORT, *judged)
    assert finetune(f"checkpoint={trained}", *options, f"out={folder}") == 0
    return folder


@pytest.mark.parametrize(("options", "reward"), [((), "progress"), (("+learn_in.reward=coverage",), "coverage")])
def test_it_learns_from_the_reward_that_the_task_suggests(trained, tmp_path, capsys, monkeypatch, options, reward):
    seen = []

    def stop(task, *args):
        seen.append(task.reward)
        raise SimError("seen")

    monkeypatch.setattr(finetuning, "make_environments", stop)
    assert refused(capsys, f"checkpoint={trained}", *SHORT, *options, f"out={tmp_path / 'run'}", code=1) == "seen"
    assert seen == [reward]


def test_a_run_leaves_what_the_documentation_promises(tuned: Path) -> None:
    rows = [json.loads(line) for line in (tuned / "metrics.jsonl").read_text().splitlines()]
    assert {"eval/success", "eval/return"} <= set(rows[0])
    assert rows[0]["step"] == 0
    assert {"train/kl", "clipped/0", "train/explained_variance", "time/collect_s", "time/update_s"} <= set(rows[-2])
    last = rows[-1]["step"]
    assert last >= 300
    for step in (0, last):
        assert len(list((tuned / "evaluations" / f"{step:08d}").glob("*.mp4"))) == 1
    for name in ("config.yaml", "success.png", "last", "best"):
        assert (tuned / name).exists(), name


def test_the_tuned_checkpoint_is_judged_without_being_told_anything(tuned: Path, tmp_path: Path) -> None:
    out = tmp_path / "judged"
    assert main(["eval", f"checkpoint={tuned}", "episodes=2", "eval.videos=0", f"out={out}"]) == 0
    assert json.loads((out / "eval.json").read_text())["episodes"] == 2
    policy = load_policy(tuned)
    assert isinstance(policy.network, StagedNetwork)
    assert policy.eta == 1.0


def test_the_earlier_steps_are_the_cloned_ones(tuned: Path, trained: Path) -> None:
    cloned, policy = load_policy(trained), load_policy(tuned)
    changed = [
        not torch.equal(late, early)
        for late, early in zip(policy.network.late.parameters(), cloned.network.parameters(), strict=True)
    ]
    assert any(changed)
    for early, base in zip(policy.network.early.parameters(), cloned.network.parameters(), strict=True):
        assert torch.equal(early, base)


def test_a_run_that_was_stopped_equals_one_that_went_on(trained: Path, tmp_path: Path) -> None:
    options = (f"checkpoint={trained}", "algo=fpo", "algo.pairs=2", *SHORT)
    assert finetune(*options, "train.env_steps=900", f"out={tmp_path / 'whole'}") == 0
    assert finetune(*options, "train.env_steps=500", f"out={tmp_path / 'part'}") == 0
    assert finetune(f"resume={tmp_path / 'part'}", "train.env_steps=900") == 0
    one, other = (read_tensors(tmp_path / run / "last" / "trainer.safetensors") for run in ("whole", "part"))
    assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize(
    "choice", [("algo=ppo", "policy=gaussian"), ("algo=fpo", "policy=flow"), ("algo.steps=4", "policy=diffusion")]
)
def test_a_policy_learns_from_nothing(tmp_path: Path, choice: tuple[str, ...]) -> None:
    pytest.importorskip("mujoco")
    small = () if "policy=gaussian" in choice else ("policy.network.hidden=16",)
    tuned = ("algo.fine_tuned_steps=4",) if "policy=diffusion" in choice else ()
    assert finetune(*choice, *HOPPER, *SHORT, *small, *tuned, f"out={tmp_path / 'run'}") == 0
    stored = yaml.safe_load((tmp_path / "run" / "last" / "config.yaml").read_text())
    assert stored["spec"]["execution_steps"] == 4
    policy = load_policy(tmp_path / "run")
    # Actions fill the task's limits, observations what random actions lead to.
    np.testing.assert_allclose(policy.normalizer.get_buffer("scale:action").numpy(), 1.0)


def test_bad_input_is_one_line_and_leaves_nothing(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = f"out={tmp_path / 'run'}"
    cases: list[tuple[tuple[str, ...], int, str]] = [
        ((), 2, "checkpoint= is missing: name a run folder of flowsteer train, or learn from nothing with task=NAME"),
        ((f"checkpoint={trained}", "policy=flow"), 2, "checkpoint= brings its own policy: leave policy= out, or leave"),
        (
            (f"checkpoint={trained}", "task=hopper", "sim.backend=gym"),
            1,
            "the policy needs observation 'agent_position', task 'hopper' offers",
        ),
        (
            (f"checkpoint={trained}", "horizon.execution_steps=4"),
            2,
            "horizon.execution_steps is the checkpoint's, 8: l",
        ),
        (
            (f"checkpoint={trained}", "task=pusht", "horizon.execution_steps=4"),
            2,
            "horizon.execution_steps is the checkpoint's, 8: l",
        ),
        (
            (f"checkpoint={trained}", "eval.seed=100000000"),
            2,
            "eval.seed must be below 100000000, where the seeds to le",
        ),
        (
            (*HOPPER, "policy=flow", "algo=fpo", "exploration=learned"),
            2,
            "FPO explores by itself: leave exploration= out",
        ),
        (("task=pusht_image", "policy=flow", *SMALL), 2, "an encoder that starts from nothing must learn: set algo.tr"),
        (
            (f"checkpoint={trained}", "algo=ppo"),
            1,
            "algo=ppo needs policy=gaussian, this is of the class FlowPolicy; algo=d",
        ),
        ((f"checkpoint={trained}", "algo=dpo"), 2, "algo 'dpo' is unknown; nearest: dppo"),
        (
            (f"checkpoint={trained}", "policy=null"),
            2,
            "policy=null chooses nothing: leave policy= out (known: diffusion, ",
        ),
        ((f"checkpoint={trained}", "exploration=null"), 2, "exploration=null chooses nothing: leave exploration= out"),
        (
            (f"checkpoint={trained}", "algo.log_prob_limits=[-5]"),
            1,
            "algo.log_prob_limits must be [low, high], got [-5",
        ),
        # What is said of the task to learn in wins over what the task suggests.
        ((f"checkpoint={trained}", "+learn_in.reward=none"), 1, "pusht: reward 'none' is unknown, choose one of"),
        (
            (f"checkpoint={trained}", "+learn_in.rewrd=x"),
            1,
            "the config of flowsteer.sim.tasks.pusht.PushT does not fit its arg",
        ),
        ((f"checkpoint={trained}", "train.lr=-1"), 1, "train.lr must be positive and finite, got -1"),
        ((f"checkpoint={trained}", "algo.epochs=3"), 2, "no option 'algo.epochs'; nearest: "),
        ((*HOPPER, "policy=flow", "algo=fpo", "policy.relative_to=x"), 1, "policy.relative_to=x is no observation of"),
        ((f"checkpoint={tmp_path}/none",), 1, f"checkpoint {tmp_path}/none does not exist"),
        ((f"resume={tmp_path}/none",), 2, f"resume={tmp_path}/none holds no run"),
    ]
    for args, code, message in cases:
        told = refused(capsys, *args, *([] if args and args[0].startswith("resume") else [*SHORT, out]), code=code)
        assert told.startswith(message), told
        assert not (tmp_path / "run").exists()


def tell_perturbation(algorithm, *args, **options):
    raise SimError(str(algorithm.perturbation))


@pytest.mark.parametrize(
    ("options", "perturbation"), [((), 0.3), (("algo.perturbation=0.2",), 0.2)], ids=["usual", "said"]
)
def test_from_nothing_fpo_explores_as_much_as_a_gaussian_does(tmp_path, capsys, monkeypatch, options, perturbation):
    monkeypatch.setattr(finetuning, "OnPolicy", tell_perturbation)
    choice = ("algo=fpo", "policy=flow", "policy.network.hidden=16", *HOPPER, *SHORT, *options)
    pytest.importorskip("mujoco")
    assert refused(capsys, *choice, f"out={tmp_path / 'run'}", code=1) == str(perturbation)


def test_a_cloned_policy_is_explored_with_less(trained, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(finetuning, "OnPolicy", tell_perturbation)
    assert refused(capsys, f"checkpoint={trained}", "algo=fpo", *SHORT, f"out={tmp_path / 'run'}", code=1) == "0.1"


def test_a_run_begins_by_saying_what_its_options_mean(trained, tmp_path, capsys):
    options = (*SHORT, "train.env_steps=30", "train.decisions=20", f"out={tmp_path / 'run'}")
    assert finetune(f"checkpoint={trained}", *options) == 0
    first, second = capsys.readouterr().out.splitlines()[:2]
    assert first.startswith("K = ")
    assert first.endswith("(last step), and train.target_kl is of it too")
    assert second == "an iteration: 80 chunks of 8 env steps, 20 in each of 4 environments"


def test_a_run_for_the_critic_alone_says_that_the_policy_is_what_it_was(trained: Path, tmp_path: Path) -> None:
    options = (f"checkpoint={trained}", *SHORT, "train.env_steps=30", "train.decisions=40", f"out={tmp_path / 'run'}")
    with pytest.warns(UserWarning, match=r"the policy is what it was: all of 1 iterations were for the critic alone"):
        assert finetune(*options) == 0


def test_who_never_sees_the_end_of_an_episode_is_warned(trained: Path, tmp_path: Path) -> None:
    options = (
        f"checkpoint={trained}",
        "algo=fpo",
        "algo.pairs=1",
        *SHORT,
        "train.env_steps=30",
        f"out={tmp_path / 'run'}",
    )
    with pytest.warns(UserWarning, match=r"episodes start anew after 8 steps, before the \d+ of task 'pusht' are over"):
        assert finetune(*options, "train.decisions=1") == 0


def test_the_critic_of_a_run_stays(tuned: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = refused(capsys, f"resume={tuned}", "critic.hidden=[8]", code=2)
    assert told.startswith("'critic.hidden=[8]' cannot go with resume=: the run was made with critic.hidden=[16]")


def test_a_run_of_no_length_is_refused(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = refused(capsys, f"checkpoint={trained}", *SHORT, "train.env_steps=-5", code=2)
    assert told == "train.env_steps must be positive, got -5"


def test_a_cloning_run_is_not_resumed_as_fine_tuning(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = refused(capsys, f"resume={trained}", code=2)
    assert told.startswith(f"resume={trained} holds no run of flowsteer finetune (Key ")
    assert told.endswith("): go on with the subcommand that made it")


def test_a_folder_that_holds_a_run_is_refused(tuned: Path, trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = refused(capsys, f"checkpoint={trained}", f"out={tuned}", code=2)
    assert told == f"{tuned} already holds a run: continue it with resume={tuned} or choose another out="
