"""Small policies and data that every test of this room shares."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from flowsteer.policies.denoising import DiffusionPolicy, FlowPolicy
from flowsteer.policies.ebt import EnergyPolicy
from flowsteer.policies.encoders.low_dim import LowDim
from flowsteer.policies.gaussian import GaussianPolicy
from flowsteer.policies.networks.residual_mlp import ResidualMLP
from flowsteer.policies.policy import Policy
from flowsteer.policies.spec import ArraySpec, PolicySpec

SPEC = PolicySpec({"state": ArraySpec((3,))}, 2, 2, 8, 4, 10.0)
NETWORK = {"_target_": "flowsteer.policies.networks.residual_mlp.ResidualMLP", "_partial_": True, "hidden": 32}
ENCODER = {"_target_": "flowsteer.policies.encoders.low_dim.LowDim", "_partial_": True}
CONFIGS: dict[str, dict[str, Any]] = {
    "diffusion": {"_target_": "flowsteer.policies.denoising.DiffusionPolicy", "encoder": ENCODER, "network": NETWORK},
    "flow": {"_target_": "flowsteer.policies.denoising.FlowPolicy", "encoder": ENCODER, "network": NETWORK},
    "ebt": {"_target_": "flowsteer.policies.ebt.EnergyPolicy", "encoder": ENCODER, "network": NETWORK},
    "gaussian": {"_target_": "flowsteer.policies.gaussian.GaussianPolicy", "encoder": ENCODER, "hidden": [32]},
}
"""What a checkpoint's config says of the policies that `make_policy` builds."""


def _statistics(**arrays: Tensor) -> dict[str, Any]:
    out = {}
    for key, value in arrays.items():
        x = value.double().numpy().reshape(len(value), -1)
        out[key] = SimpleNamespace(min=x.min(0), max=x.max(0), mean=x.mean(0), std=x.std(0))
    return out


def _make_policy(family: str, seed: int = 0) -> Policy:
    torch.manual_seed(seed)
    network = partial(ResidualMLP, hidden=32)
    families: dict[str, Callable[[], Policy]] = {
        "diffusion": lambda: DiffusionPolicy(SPEC, LowDim, network),
        "flow": lambda: FlowPolicy(SPEC, LowDim, network),
        "ebt": lambda: EnergyPolicy(SPEC, LowDim, network),
        "gaussian": lambda: GaussianPolicy(SPEC, LowDim, hidden=(32,)),
    }
    policy = families[family]()
    policy.fit_normalizer(_statistics(state=torch.randn(50, 3), action=torch.randn(50, 2)))
    return policy


def _make_batch(rows: int, seed: int = 0) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "obs": {"state": torch.randn(rows, 2, 3, generator=generator)},
        "action": torch.randn(rows, 8, 2, generator=generator),
    }


class FakeBatches:
    """Random batches by number; of each global batch this process takes its slice."""

    def __init__(self, batch_size: int, rank: int = 0, processes: int = 1) -> None:
        rows = batch_size // processes
        self.batch_size, self.rows, self.number = batch_size, slice(rank * rows, (rank + 1) * rows), 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return self

    def __next__(self) -> dict[str, Any]:
        batch = _make_batch(self.batch_size, seed=self.number)
        self.number += 1
        return {"obs": {"state": batch["obs"]["state"][self.rows]}, "action": batch["action"][self.rows]}

    def state_dict(self) -> dict[str, Any]:
        return {"number": self.number}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.number = state["number"]


@pytest.fixture(params=["diffusion", "flow", "ebt", "gaussian"])
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def make_statistics() -> Callable[..., dict[str, Any]]:
    """Samples [N, ...] by key -> their statistics."""
    return _statistics


@pytest.fixture
def make_policy() -> Callable[..., Policy]:
    """Family, seed -> a small policy with a fitted normaliser."""
    return _make_policy


@pytest.fixture
def make_batch() -> Callable[..., dict[str, Any]]:
    """Rows, seed -> a random batch."""
    return _make_batch


@pytest.fixture
def make_batches() -> type[FakeBatches]:
    """Batch size, rank, processes -> an endless, resumable source of batches."""
    return FakeBatches


@pytest.fixture
def describe() -> Callable[[str], dict[str, Any]]:
    """Family -> what a checkpoint's config says of a policy from `make_policy`."""
    return lambda family: {"policy": CONFIGS[family], "spec": SPEC.to_dict()}
