"""What an evaluation leaves behind: `eval.json`, plots, and videos of chosen episodes."""

from __future__ import annotations

import json
import math
import platform
import re
import subprocess
import warnings
from collections.abc import Callable, Iterable
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path
from typing import Any

import numpy as np

from flowsteer.policies.spec import PolicySpec
from flowsteer.sim.errors import SimError
from flowsteer.sim.evaluate import Episode, Evaluation
from flowsteer.sim.files import replacing
from flowsteer.sim.plots import plot_episode, plot_episodes
from flowsteer.sim.statistics import Interval
from flowsteer.sim.tasks.base import Task
from flowsteer.sim.video import film, write_video

EVAL_JSON = "eval.json"
PACKAGES = (
    "flowsteer",
    "torch",
    "numpy",
    "mujoco",
    "mujoco-warp",
    "warp-lang",
    "ray",
    "robosuite",
    "gymnasium",
    "gymnasium-robotics",
    "gym-pusht",
    "pymunk",
    "diffusers",
    "zarr",
)
ROLES = ("first", "best", "worst", "next")
"""Of the episodes that are shown; `ROLE_seedSEED` is the name of each."""
PICTURE = re.compile(rf"({'|'.join(ROLES)})_seed\d+\.(mp4|png)")


def write_evaluation(evaluation: Evaluation, out_dir: Path, task: Task | None = None, videos: int = 3) -> Path:
    """Write `eval.json`, `episodes.png` and, where a task is given, videos of chosen episodes.

    An episode is filmed by executing its recorded actions again from its seed, so that only what is shown is rendered.
    Where that fails, one warning says why and what to install, and the episode's actions are plotted instead. Pictures
    never cost the evaluation: `eval.json` is there before the first of them.

    Args:
        evaluation: of `evaluate`.
        out_dir: created if need be; what an earlier evaluation left there is replaced, its pictures are deleted.
        task: the evaluation's task.
        videos: how many episodes: the first, the best, the worst, then on in order of the seeds.

    Returns:
        The path of `eval.json`.
    """
    out_dir.mkdir(parents=True, exist_ok=True)
    path, content = out_dir / EVAL_JSON, summary(evaluation)
    # A graphics library may take the whole process down.
    _write_json(path, {**content, "shown": {}})
    _delete_pictures(out_dir)
    _or_warn("episodes.png", lambda: plot_episodes(evaluation, out_dir / "episodes.png"))
    shown = {}
    if task is not None:
        chosen = choose(evaluation, videos).items()
        pictures = {name: _show(task, evaluation.prediction, episode, out_dir / name) for name, episode in chosen}
        shown = {name: picture.name for name, picture in pictures.items() if picture is not None}
    _or_warn(f"names of the videos in {EVAL_JSON}", lambda: _write_json(path, {**content, "shown": shown}))
    return path


def _delete_pictures(folder: Path) -> None:
    for picture in folder.iterdir():
        if PICTURE.fullmatch(picture.name):
            picture.unlink()


def _write_json(path: Path, content: dict[str, Any]) -> None:
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n")


def choose(evaluation: Evaluation, count: int) -> dict[str, Episode]:
    """Up to `count` different episodes, named: the first, the best, the worst, then the next in order of the seeds."""
    kept = evaluation.kept
    if not kept:
        return {}
    by_merit = sorted(kept, key=lambda episode: (episode.success, episode.max_reward, episode.reward_sum))
    episodes = (kept[0], by_merit[-1], by_merit[0])
    roles = [*zip(ROLES, episodes, strict=False), *((ROLES[-1], episode) for episode in kept)]
    chosen: dict[int, tuple[str, Episode]] = {}
    for role, episode in roles:
        chosen.setdefault(episode.seed, (role, episode))
    return {f"{role}_seed{seed}": episode for seed, (role, episode) in list(chosen.items())[:count]}


def summary(evaluation: Evaluation) -> dict[str, Any]:
    """Everything in `eval.json`, in plain types; what cannot be known is null."""
    return {
        "task": evaluation.task,
        "episodes": len(evaluation.episodes),
        "lost": len(evaluation.episodes) - len(evaluation.kept),
        "execution": evaluation.execution,
        "execution_options": dict(evaluation.execution_options),
        "execution_steps": evaluation.prediction.execution_steps,
        "delay_steps": evaluation.delay_steps,
        "success": _interval(evaluation.success),
        "return": _interval(evaluation.reward_sum),
        "max_reward": _interval(evaluation.max_reward),
        "env_steps": evaluation.env_steps,
        "network_evaluations": evaluation.network_evaluations,
        "decision_ms": _percentiles_ms(evaluation.decision_s),
        "decision_batch": evaluation.decision_batch,
        "wall_s": round(evaluation.wall_s, 3),
        "rows": [_row(episode) for episode in evaluation.episodes],
        "versions": versions(),
    }


def versions() -> dict[str, str | None]:
    """Of everything that can change a result; null what is not installed."""
    return {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}, "git": revision()}


def revision() -> str | None:
    """The commit of this source tree, else the one that pip installed it from, else the version of the package."""
    return checkout_revision() or _installed_revision()


def checkout_revision() -> str | None:
    """The commit of this source tree, "+" appended where tracked files differ from it; None outside a checkout."""
    folder = Path(__file__).parent
    # Where flowsteer is installed into an environment inside some other project, this file is not tracked there.
    if _git(folder, "ls-files", "--error-unmatch", Path(__file__).name) is None:
        return None
    commit, changes = _git(folder, "rev-parse", "HEAD"), _git(folder, "status", "--porcelain", "--untracked-files=no")
    return None if commit is None else commit + ("+" if changes else "")


def _installed_revision() -> str | None:
    """What pip noted of `pip install git+URL` (PEP 610), else the version."""
    try:
        package = distribution("flowsteer")
    except PackageNotFoundError:
        return None
    origin = json.loads(package.read_text("direct_url.json") or "{}")
    commit: str = origin.get("vcs_info", {}).get("commit_id", package.version)
    return commit


def _git(folder: Path, *arguments: str) -> str | None:
    command = ["git", "-C", str(folder), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _show(task: Task, prediction: PolicySpec, episode: Episode, stem: Path) -> Path | None:
    """A video of the episode, a plot where that cannot be made, or None where nothing can."""
    video, plot = stem.with_suffix(".mp4"), stem.with_suffix(".png")
    if _or_warn("video", lambda: write_video(video, *film(task, episode, prediction))):
        return video
    return plot if _or_warn(plot.name, lambda: plot_episode(episode, prediction, plot)) else None


def _or_warn(what: str, write: Callable[[], None]) -> bool:
    """Whether `write` worked; no picture is worth the evaluation, whatever graphics and codecs may raise."""
    try:
        write()
    except Exception as error:
        name = "" if isinstance(error, SimError) else f"{type(error).__name__}: "
        warnings.warn(f"no {what}: {name}{' '.join(str(error).split())}", RuntimeWarning, stacklevel=3)
        return False
    return True


def _row(episode: Episode) -> dict[str, Any]:
    return {
        "seed": episode.seed,
        "success": episode.success,
        "return": _number(episode.reward_sum),
        "max_reward": _number(episode.max_reward),
        "length": episode.length,
        "terminated": episode.terminated,
        "lost": episode.lost,
    }


def _interval(interval: Interval) -> dict[str, float | None]:
    return {name: _number(value) for name, value in interval._asdict().items()}


def _percentiles_ms(times_s: Iterable[float]) -> dict[str, float | None]:
    times_ms = 1000 * np.array(list(times_s) or [math.nan])
    p50, p95 = np.quantile(times_ms, (0.5, 0.95))
    return {"p50": _number(p50), "p95": _number(p95)}


def _number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
