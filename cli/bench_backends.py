"""`flowsteer bench backends`: whether back ends agree, by the returns and the observations of the same episodes.

Dimension letters: B environments, E episodes, Do observed numbers in all, Da action width.
"""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, NamedTuple, final

import numpy as np
import torch
from numpy.typing import NDArray
from omegaconf import DictConfig
from torch import Tensor

from flowsteer.cli.bench import benchmark
from flowsteer.cli.checks import check_filled, check_positive, check_seeds
from flowsteer.cli.devices import find_device
from flowsteer.cli.errors import UsageError, unknown
from flowsteer.cli.simulation import find_task
from flowsteer.sim.backends import BACKENDS
from flowsteer.sim.spec import TaskSpec
from flowsteer.sim.statistics import Interval, bootstrap
from flowsteer.sim.vec_env import IDLE, Observation, VecEnv

TRIAL_EPISODES = 16
COMPARED_STEPS = (1, 20)
NO_REFERENCE = "reference return is 0 or lost"


@final
@dataclass
class BackendsBenchmark:
    """What to play in each back end.

    Attributes:
        task: name as in `flowsteer eval`.
        backends: the first is what the others are compared with.
        episodes: seeds `seed`, `seed` + 1, ... in each.
        candidates: random policies, of which the best in the first episodes of the first back end plays.
        chunk_steps: control steps under the same action.
        num_envs: batch size.
        device: of "warp", "auto" (a GPU where there is one) or "cpu".
        name: of the file to write.
        out: where to write it.
    """

    task: str = "hopper"
    backends: list[str] = field(default_factory=lambda: ["threads", "warp"])
    episodes: int = 256
    seed: int = 0
    candidates: int = 32
    chunk_steps: int = 4
    num_envs: int = 256
    device: str = "auto"
    name: str = "backends"
    out: str | None = None


@final
class LinearPolicy:
    """Squashes a linear function of all that is observed to the task's limits; drawn from its seed.

    Observations, and a constant 1, go through sign(x) log(1 + |x|) and are scaled to length 1 first: neither pixels nor
    radians then saturate it.
    """

    def __init__(self, spec: TaskSpec, seed: int) -> None:
        self.seed = seed
        observed = sum(int(np.prod(array.shape)) for array in spec.observations.values())
        self._weights = torch.randn(observed + 1, spec.action_dim, generator=torch.Generator().manual_seed(seed))
        low, high = torch.tensor(spec.action_low), torch.tensor(spec.action_high)
        self._middle, self._half = (low + high) / 2, (high - low) / 2

    def __call__(self, observation: Observation, steps: int) -> Tensor:
        """The same action [B, steps, Da] for windows {key: [B, To, ...]}, of which the last counts."""
        now = torch.cat([observation[key][:, -1].flatten(1).float().cpu() for key in sorted(observation)], dim=1)
        now = torch.cat([now, torch.ones(len(now), 1)], dim=1)
        features = torch.nn.functional.normalize(now.sign() * now.abs().log1p(), dim=1)
        action = self._middle + self._half * torch.tanh(features @ self._weights)
        return action[:, None].expand(-1, steps, -1)


class Played(NamedTuple):
    """Of E episodes: returns [E] and whether they were lost [E]; env steps and seconds of all."""

    returns: NDArray[np.float64]
    lost: NDArray[np.bool_]
    env_steps: int
    wall_s: float


def measure(config: DictConfig) -> dict[str, Any]:
    """`rows`: one per back end; differences are to the first."""
    _check(config)
    device, task = find_device(config.device), find_task(config.task, {})
    num_envs = min(config.num_envs, config.episodes)
    seeds = range(config.seed, config.seed + config.episodes)
    with ExitStack() as stack:
        envs = {
            name: stack.enter_context(BACKENDS[name](task, num_envs, 1, device=device if name == "warp" else "cpu"))
            for name in config.backends
        }
        first = next(iter(envs.values()))
        policy = best_policy(first, config.candidates, seeds[:TRIAL_EPISODES], config.chunk_steps)
        played = {name: play(env, policy, seeds, config.chunk_steps) for name, env in envs.items()}
        reference = next(iter(played.values()))
        rows = [
            {"backend": name, **_scores(played[name], reference), **observed_differences(first, env, policy, seeds)}
            for name, env in envs.items()
        ]
    return {"rows": rows, "task": config.task, "policy_seed": policy.seed, "chunk_steps": config.chunk_steps}


def _check(config: DictConfig) -> None:
    check_filled(config, "backends")
    check_positive(config, "episodes", "candidates", "chunk_steps", "num_envs")
    check_seeds(config, "seed")
    for name in config.backends:
        if name not in BACKENDS:
            raise unknown("backend", name, BACKENDS)
    if len(set(config.backends)) != len(config.backends):
        raise UsageError("backends names one twice: each is compared with the first")


def best_policy(env: VecEnv, candidates: int, seeds: range, chunk_steps: int) -> LinearPolicy:
    """Of policies 0, 1, ... the one with the highest mean return: most random ones fall at once."""
    policies = [LinearPolicy(env.spec, seed) for seed in range(candidates)]
    return max(policies, key=lambda policy: float(play(env, policy, seeds, chunk_steps).returns.mean()))


def play(env: VecEnv, policy: LinearPolicy, seeds: range, chunk_steps: int) -> Played:
    """Every episode of `seeds` to its end."""
    start, steps = time.perf_counter(), 0
    returns = torch.zeros(len(seeds), dtype=torch.float64, device=env.device)
    lost = torch.zeros(len(seeds), dtype=torch.bool, device=env.device)
    observation = env.reset(seeds)
    while any(seed != IDLE for seed in env.seeds):
        result = env.step_chunk(policy(observation, chunk_steps))
        active = result.info["active"]
        places = result.info["seed"][active] - seeds.start
        returns.index_add_(0, places, result.reward_sum[active].double())
        lost[places] |= result.info["lost"][active]
        steps += int(result.info["env_steps"].sum())
        observation = result.obs
    return Played(returns.cpu().numpy(), lost.cpu().numpy(), steps, time.perf_counter() - start)


def observed_differences(one: VecEnv, other: VecEnv, policy: LinearPolicy, seeds: range) -> dict[str, float | None]:
    """The largest absolute difference in any observed number after some steps, in episodes that still run in both.

    Both take the actions that the policy chooses in `one`. None where no episode lasts so long.
    """
    found: dict[str, float | None] = {f"difference_{steps}": None for steps in COMPARED_STEPS}
    if one is other:
        return found
    observation, running = one.reset(seeds), torch.ones(one.num_envs, dtype=torch.bool)
    other.reset(seeds)
    for step in range(1, max(COMPARED_STEPS) + 1):
        actions = policy(observation, 1)
        ours, theirs = one.step_chunk(actions), other.step_chunk(actions)
        observation, running = ours.obs, running & ~ours.ended.cpu() & ~theirs.ended.cpu()
        if not running.any():
            return found
        if step in COMPARED_STEPS:
            pairs = [(array.cpu()[running], theirs.obs[key].cpu()[running]) for key, array in ours.obs.items()]
            found[f"difference_{step}"] = max(float((a.double() - b.double()).abs().max()) for a, b in pairs)
    return found


def _scores(played: Played, reference: Played) -> dict[str, Any]:
    kept = ~played.lost & ~reference.lost
    relative = relative_difference(played.returns[kept], reference.returns[kept])
    return {
        "episodes": len(played.returns),
        "lost": int(played.lost.sum()),
        "return": bootstrap(played.returns[~played.lost])._asdict(),
        "relative": NO_REFERENCE if relative is None else relative._asdict(),
        "env_steps": played.env_steps,
        "wall_s": round(played.wall_s, 2),
    }


def relative_difference(returns: NDArray[np.float64], reference: NDArray[np.float64]) -> Interval | None:
    """The mean difference, episode by episode, over the size of the mean of `reference`; None where that is 0."""
    size = abs(float(reference.mean())) if len(reference) else 0.0
    return Interval(*(value / size for value in bootstrap(returns - reference))) if size else None


main = benchmark(
    "backends", "Whether back ends agree: returns and observations of the same episodes.", BackendsBenchmark, measure
)
