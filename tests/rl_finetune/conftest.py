"""A task that takes microseconds, and small policies for it."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import torch

from flowsteer.policies.denoising import DiffusionPolicy, FlowPolicy
from flowsteer.policies.ebt import EnergyPolicy
from flowsteer.policies.encoders.cameras import Cameras
from flowsteer.policies.encoders.low_dim import LowDim
from flowsteer.policies.encoders.vit import SmallViT
from flowsteer.policies.gaussian import GaussianPolicy
from flowsteer.policies.networks.residual_mlp import ResidualMLP
from flowsteer.policies.spec import ArraySpec, PolicySpec
from flowsteer.sim.backends import BACKENDS
from flowsteer.sim.spec import TaskSpec
from flowsteer.sim.tasks.base import SingleEnv, Step, Task

HIGH = 2.0


class AimEnv(SingleEnv):
    """Say where the target is: the reward is minus the distance, the episode ends by rule after 3 hits, else by time.

    In the episode of seed `nan_seed` the observation or the reward (`nan_in`) is not finite after the first step.
    """

    def __init__(self, nan_seed=None, nan_in="target"):
        self.nan_seed, self.nan_in = nan_seed, nan_in

    def reset(self, seed):
        self.seed, self.steps, self.hits = seed, 0, 0
        self.target = np.random.default_rng(seed).uniform(-1, 1, 2)
        return self._observation()

    def step(self, action):
        self.steps += 1
        distance = float(np.abs(action - self.target).max())
        self.hits += distance < 0.1
        done = self.hits >= 3
        return Step(self._observation(), self._broken("reward", -distance), done, done)

    def _observation(self):
        return {"target": self._broken("target", self.target).astype(np.float32)}

    def _broken(self, name, value):
        return value * np.nan if self.seed == self.nan_seed and self.steps and self.nan_in == name else value

    def render(self):
        return np.zeros((16, 16, 3), np.uint8)

    def project(self, actions):
        return None

    def close(self):
        pass


class Aim(Task):
    heavy = False
    dataset_keys: ClassVar[dict] = {}
    spec = TaskSpec("aim", {"target": ArraySpec((2,))}, 2, (-HIGH, -HIGH), (HIGH, HIGH), 10.0, 12)

    def __init__(self, nan_seed=None, nan_in="target"):
        self.nan_seed, self.nan_in = nan_seed, nan_in

    def make(self):
        return AimEnv(self.nan_seed, self.nan_in)


class SeenAimEnv(AimEnv):
    """The target is the brightness of two channels of an image."""

    def _observation(self):
        shown = np.zeros((24, 24, 3), np.uint8)
        shown[..., :2] = 127 * (1 + self.target)
        return {"image": shown}


class SeenAim(Task):
    heavy = False
    dataset_keys: ClassVar[dict] = {}
    spec = TaskSpec("aim_image", {"image": ArraySpec((24, 24, 3), "uint8")}, 2, (-HIGH, -HIGH), (HIGH, HIGH), 10.0, 12)

    def make(self):
        return SeenAimEnv()


SPEC = PolicySpec({"target": ArraySpec((2,))}, 2, 1, 4, 2, 10.0)
SEEN = PolicySpec(dict(SeenAim.spec.observations), 2, 1, 4, 2, 10.0)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _limits(bound, width):
    ones = np.ones(width)
    return SimpleNamespace(min=-bound * ones, max=bound * ones, mean=0 * ones, std=bound * ones)


def policy_of(family, steps=4, seed=0, fresh=False, **options):
    """A policy for `Aim`; unless it is fresh, nothing in it is 0, which would hide what depends on it."""
    torch.manual_seed(seed)
    network = partial(ResidualMLP, hidden=32, blocks=2)
    families = {
        "diffusion": partial(DiffusionPolicy, network=network, steps=steps),
        "flow": partial(FlowPolicy, network=network, steps=steps),
        "gaussian": partial(GaussianPolicy, hidden=(32,)),
        "ebt": partial(EnergyPolicy, network=network),
    }
    policy = families[family](spec=SPEC, encoder=LowDim, **options)
    policy.fit_normalizer({"target": _limits(1.0, 2), "action": _limits(HIGH, 2)})
    for name, parameter in policy.named_parameters():
        if not fresh and ("output" in name or "modulation" in name):
            torch.nn.init.normal_(parameter, std=0.1)
    return policy.eval()


@pytest.fixture
def seeing_aim():
    """The task from images, and what makes a flow policy for it."""

    def make():
        torch.manual_seed(0)
        camera = partial(Cameras, backbone=partial(SmallViT, embed_dim=8, heads=2, features=8), brightness=0.1)
        policy = FlowPolicy(SEEN, camera, partial(ResidualMLP, hidden=32, blocks=2), steps=4)
        policy.fit_normalizer({"action": _limits(HIGH, 2)})
        return policy.eval()

    return SeenAim(), make


@pytest.fixture
def make_policy():
    return policy_of


@pytest.fixture
def make_env():
    made = []

    def make(num_envs=8, **options):
        env = BACKENDS["gym"](Aim(**options), num_envs, 1, workers=0, device="cpu")
        made.append(env)
        return env

    yield make
    for env in made:
        env.close()


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


@pytest.fixture
def observe():
    def make(rows=6, seed=0):
        return {"target": torch.rand(rows, 1, 2, generator=torch.Generator().manual_seed(seed)) * 2 - 1}

    return make
