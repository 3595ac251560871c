import json
import subprocess
from fractions import Fraction
from importlib.metadata import Distribution

import av
import numpy as np
import pytest
import torch
from counting import Counting

from flowsteer.policies.spec import ArraySpec, PolicySpec
from flowsteer.sim import results
from flowsteer.sim.backends import gym
from flowsteer.sim.errors import SimError
from flowsteer.sim.evaluate import evaluate
from flowsteer.sim.files import replacing
from flowsteer.sim.results import choose, write_evaluation
from flowsteer.sim.video import film, write_video


class Rising:
    """Predicts 100 (seed modulo 3) + row; seeds 2, 5, ... do best."""

    spec = PolicySpec({"count": ArraySpec((3,))}, 1, 1, 5, 4, 10.0)

    def predict(self, obs, *, noise=None, generator=None):
        return (100 * (obs["count"][:, -1:, :1] % 3) + torch.arange(5.0)[:, None]) + 300


def judged(task, episodes=4, seed=3):
    with gym(task, 2, 1) as env:
        return evaluate(Rising(), env, episodes=episodes, seed=seed)


def read_frames(path):
    with av.open(str(path)) as container:
        rate = container.streams.video[0].average_rate
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)], rate


def test_eval_json_holds_everything(tmp_path):
    path = write_evaluation(judged(Counting(limit=6)), tmp_path / "out")
    content = json.loads(path.read_text())
    assert (content["task"], content["episodes"], content["lost"], content["env_steps"]) == ("counting", 4, 0, 24)
    assert content["success"]["mean"] == 0.25
    assert (
        content["success"].keys() == content["return"].keys() == content["max_reward"].keys() == {"mean", "low", "high"}
    )
    assert [row["seed"] for row in content["rows"]] == [3, 4, 5, 6]
    # Chunks of rows 0-3 then 0-1 over bases 300, 400, 500, 300.
    assert [row["return"] for row in content["rows"]] == [1807, 2407, 3007, 1807]
    assert [row["max_reward"] for row in content["rows"]] == [303, 403, 503, 303]
    assert [row["success"] for row in content["rows"]] == [False, False, True, False]
    assert content["rows"][0] == {**content["rows"][0], "length": 6, "terminated": False, "lost": False}
    assert content["decision_ms"]["p50"] <= content["decision_ms"]["p95"]
    assert content["decision_batch"] == 2
    assert content["versions"]["torch"] == torch.__version__
    assert content["versions"]["flowsteer"]
    assert content["shown"] == {}
    assert sorted(file.name for file in path.parent.iterdir()) == ["episodes.png", "eval.json"]


def test_one_episode_has_no_interval_for_its_return(tmp_path):
    content = json.loads(write_evaluation(judged(Counting(limit=6), episodes=1), tmp_path).read_text())
    assert content["return"] == {"mean": 1807.0, "low": None, "high": None}


def test_first_best_and_worst_episodes_are_filmed(tmp_path):
    task = Counting(limit=6)
    evaluation = judged(task, seed=4)
    content = json.loads(write_evaluation(evaluation, tmp_path, task, videos=3).read_text())
    assert content["shown"] == {
        "first_seed4": "first_seed4.mp4",
        "best_seed5": "best_seed5.mp4",
        "worst_seed6": "worst_seed6.mp4",
    }
    frames, rate = read_frames(tmp_path / "best_seed5.mp4")
    assert rate == 10
    assert len(frames) == 7
    assert frames[0].shape == (64 * 6, 96 * 6, 3)
    # The scene has one more grey column (6 pixels in the video) after every step.
    assert [int((frame[200, :60].mean(axis=1) > 100).sum()) for frame in frames] == pytest.approx(
        range(0, 42, 6), abs=3
    )


def test_pictures_of_an_earlier_evaluation_are_gone(tmp_path):
    task = Counting(limit=6)
    write_evaluation(judged(task, seed=4), tmp_path, task, videos=2)
    for name in ("first_seed1.png", "mine_seed1.mp4", "first_seeds.mp4"):
        (tmp_path / name).write_text("x")
    content = json.loads(write_evaluation(judged(task, seed=7), tmp_path, task, videos=1).read_text())
    assert content["shown"] == {"first_seed7": "first_seed7.mp4"}
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "episodes.png",
        "eval.json",
        "first_seed7.mp4",
        "first_seeds.mp4",
        "mine_seed1.mp4",
    ]


def test_more_videos_go_on_in_order_of_the_seeds():
    evaluation = judged(Counting(limit=6), episodes=5, seed=4)
    assert list(choose(evaluation, 4)) == ["first_seed4", "best_seed8", "worst_seed6", "next_seed5"]
    assert list(choose(evaluation, 0)) == []


def test_without_graphics_actions_are_plotted_and_one_line_says_what_to_install(tmp_path):
    task = Counting(limit=6, visible=False)
    with pytest.warns(RuntimeWarning, match="no video: cannot render: install libegl1"):
        path = write_evaluation(judged(task), tmp_path, task, videos=1)
    assert json.loads(path.read_text())["shown"] == {"first_seed3": "first_seed3.png"}
    assert sorted(file.name for file in tmp_path.iterdir()) == ["episodes.png", "eval.json", "first_seed3.png"]


def test_what_a_codec_raises_costs_the_video_only(tmp_path, monkeypatch):
    def broken(*_, **__):
        raise av.error.EncoderNotFoundError(1, "no encoder")

    monkeypatch.setattr(av, "open", broken)
    task = Counting(limit=6)
    with pytest.warns(RuntimeWarning, match="no video: EncoderNotFoundError: .*no encoder"):
        path = write_evaluation(judged(task), tmp_path, task, videos=1)
    assert json.loads(path.read_text())["shown"] == {"first_seed3": "first_seed3.png"}


def test_without_room_for_pictures_the_numbers_are_kept(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", full)
    monkeypatch.setattr(results, "write_video", full)
    task = Counting(limit=6)
    with pytest.warns(RuntimeWarning) as told:
        path = write_evaluation(judged(task), tmp_path, task, videos=1)
    assert [str(warning.message).split(": ")[0] for warning in told] == [
        "no episodes.png",
        "no video",
        "no first_seed3.png",
    ]
    content = json.loads(path.read_text())
    assert (content["episodes"], content["shown"]) == (4, {})
    assert [file.name for file in tmp_path.iterdir()] == ["eval.json"]


def test_the_numbers_are_there_before_the_first_picture(tmp_path, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(results, "plot_episodes", killed)
    with pytest.raises(KeyboardInterrupt):
        write_evaluation(judged(Counting(limit=6)), tmp_path)
    assert json.loads((tmp_path / "eval.json").read_text())["episodes"] == 4


def test_a_fast_task_is_filmed_at_no_more_than_30_frames_per_second():
    class Fast(Counting):
        def __init__(self):
            super().__init__(limit=6)
            object.__setattr__(self.spec, "control_hz", 125.0)

    frames, rate = film(Fast(), judged(Counting(limit=6)).episodes[0], Rising.spec)
    assert rate == Fraction(125, 4)
    assert len(list(frames)) == 3  # before steps 0 and 4, and the end


def test_the_chunk_is_drawn_where_the_task_projects_it():
    class Pointing:
        spec = PolicySpec({"count": ArraySpec((3,))}, 1, 1, 3, 2, 10.0)

        def predict(self, obs, *, noise=None, generator=None):
            return torch.tensor([20.0, 30.0, 40.0])[None, :, None].expand(len(obs["count"]), 3, 1)

    with gym(Counting(limit=2), 1, 1) as env:
        episode = evaluate(Pointing(), env, episodes=1, seed=0).episodes[0]
    frames, _ = film(Counting(limit=2), episode, Pointing.spec)
    first, second, end = frames
    scale = len(first) // 64
    pixel = {
        name: [frame[v * scale, v * scale].tolist() for v in (20, 30, 40)]
        for name, frame in (("first", first), ("second", second), ("end", end))
    }
    assert pixel["first"][0][0] > pixel["first"][0][2] > -1  # orange: to be executed
    assert pixel["first"][2][2] > pixel["first"][2][0]  # blue: beyond
    assert pixel["second"][0] == [0, 0, 0]  # already executed
    assert pixel["second"][1][0] > pixel["second"][1][2]
    assert pixel["end"] == [[0, 0, 0]] * 3


def test_videos_hold_the_frames(tmp_path):
    frames = [np.full((64, 96, 3), level, dtype=np.uint8) for level in (0, 120, 240)]
    write_video(tmp_path / "a.mp4", frames, Fraction(25, 2))
    seen, rate = read_frames(tmp_path / "a.mp4")
    assert rate == Fraction(25, 2)
    assert [round(frame.mean()) for frame in seen] == pytest.approx([0, 120, 240], abs=4)


def test_nothing_half_written_is_left(tmp_path):
    def failing():
        yield np.zeros((64, 96, 3), dtype=np.uint8)
        raise SimError("lost the picture")

    with pytest.raises(SimError, match="lost the picture"):
        write_video(tmp_path / "a.mp4", failing(), Fraction(10))
    with pytest.raises(SimError, match="there are no frames to write"):
        write_video(tmp_path / "b.mp4", [], Fraction(10))
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    def replace():
        with replacing(tmp_path / "c.txt") as temporary:
            temporary.write_text("half")
            raise OSError(28, "No space left on device")

    (tmp_path / "c.txt").write_text("old")
    with pytest.raises(
        SimError, match=r"c.txt cannot be written \(No space left on device\): free disk space or choose"
    ):
        replace()
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("c.txt", "old")]


def test_the_revision_is_that_of_our_own_checkout_only(tmp_path, monkeypatch):
    def git(*arguments):
        subprocess.run(["git", "-C", tmp_path, "-c", "user.name=a", "-c", "user.email=a@b", *arguments], check=True)

    source = tmp_path / "results.py"
    source.write_text("1")
    monkeypatch.setattr(results, "__file__", str(source))
    git("init", "-q")
    assert results.checkout_revision() is None  # as when installed inside another project's checkout
    git("add", "results.py")
    git("commit", "-qm", "x")
    revision = results.checkout_revision()
    assert len(revision) == 40
    assert results.revision() == revision
    source.write_text("2")
    assert results.checkout_revision() == revision + "+"


def installed(folder, monkeypatch, **files):
    """A plain install of flowsteer 9.1 in `folder`, outside any checkout."""
    info = folder / "flowsteer-9.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: flowsteer\nVersion: 9.1\n")
    for name, content in files.items():
        (info / f"{name}.json").write_text(content)
    monkeypatch.setattr(results, "__file__", str(folder / "results.py"))
    monkeypatch.setattr(results, "distribution", lambda name: Distribution.at(info))


def test_an_install_from_a_repository_tells_the_revision_that_pip_noted(tmp_path, monkeypatch):
    noted = {"url": "https://x.org/a.git", "vcs_info": {"vcs": "git", "commit_id": "f" * 40}}
    installed(tmp_path, monkeypatch, direct_url=json.dumps(noted))
    assert results.versions()["git"] == "f" * 40


@pytest.mark.parametrize("files", [{}, {"direct_url": '{"url": "file:///a", "dir_info": {}}'}])
def test_any_other_install_tells_its_version(tmp_path, monkeypatch, files):
    installed(tmp_path, monkeypatch, **files)
    assert results.versions()["git"] == "9.1"
    assert {"diffusers", "zarr"} <= results.versions().keys()
