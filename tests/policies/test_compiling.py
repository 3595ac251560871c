"""Training through torch.compile: the same checkpoints, the same resuming, and a plain refusal where it cannot be."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from flowsteer.policies.build import build
from flowsteer.policies.checkpoint import load_policy
from flowsteer.policies.cloning import Cloning
from flowsteer.policies.cloning_config import CloningConfig
from flowsteer.policies.errors import PolicyError
from flowsteer.policies.policy import Policy
from flowsteer.policies.random_state import seed_everything
from flowsteer.policies.spec import PolicySpec

NOISY = {"noise": 0.1}
"""Draws of the encoder are compiled too; a Gaussian policy has the fewest kernels, each of which takes a second."""
Start = Callable[..., Cloning]


@pytest.fixture
def start(make_policy: Callable[..., Policy], make_batches: Callable[..., Any], describe: Callable[..., Any]) -> Start:
    """Folder, whether to compile -> a run of 6 steps that has not begun."""

    described = describe("gaussian")
    described["policy"] = {**described["policy"], "encoder": {**described["policy"]["encoder"], **NOISY}}

    def make(folder: Path, compile: bool) -> Cloning:
        seed_everything(3)
        policy = build(described["policy"], spec=PolicySpec.from_dict(described["spec"]))
        policy.normalizer.load_state_dict(make_policy("gaussian").normalizer.state_dict())
        config = CloningConfig(steps=6, warmup_steps=1, precision="float32", log_every=2, compile=compile)
        return Cloning(policy, config, make_batches(16), 16, folder=folder, describe=described)

    return make


class Losses:
    def __init__(self) -> None:
        self.values: list[float] = []

    def log(self, step: int, values: Any) -> None:
        self.values.append(values["train/loss"])


def test_a_compiled_run_learns_the_same_resumes_exactly_and_saves_plain_weights(
    quick_compiler: None, start: Start, tmp_path: Path
) -> None:
    plain, compiled = Losses(), Losses()
    whole, eager = start(tmp_path / "whole", True), start(tmp_path / "eager", False)
    assert whole.train(compiled)
    assert eager.train(plain)
    assert compiled.values == pytest.approx(plain.values, rel=0.05), "but for the draws of the encoder"

    part = start(tmp_path / "part", True)
    for _ in range(2):
        part._timed_update()
    part.save()
    resumed = start(tmp_path / "part", True)
    seed_everything(99)
    resumed.resume(tmp_path / "part")
    assert resumed.train(Losses())
    ours, theirs = resumed.state(), whole.state()
    assert ours.values | {"train_s": 0} == theirs.values | {"train_s": 0}
    assert all(torch.equal(value, ours.tensors[key]) for key, value in theirs.tensors.items())

    names = []
    for run in ("whole", "eager"):
        with safe_open(tmp_path / run / "last" / "policy.safetensors", "pt") as file:
            names.append(sorted(file.keys()))
    assert names[0] == names[1]
    loaded = load_policy(tmp_path / "whole")
    for name, value in whole.ema.average.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    start(tmp_path / "whole", False).resume(tmp_path / "whole")


def test_a_denoising_loss_is_one_graph_for_any_draws(
    make_policy: Callable[..., Policy], make_batch: Callable[..., Any]
) -> None:
    policy = make_policy("flow")
    torch.compiler.reset()
    compiled = torch.compile(policy, backend="aot_eager", fullgraph=True)
    for seed, stance in ((0, "default"), (1, "fail_on_recompile")):
        batch, draws = make_batch(8, seed), policy.draw(8, torch.Generator().manual_seed(seed))
        with torch.compiler.set_stance(stance):
            total = compiled(batch, draws).total
        torch.testing.assert_close(total, policy.loss(batch, draws).total)
        total.backward()
    torch.compiler.reset()
    assert all(parameter.grad is not None for parameter in policy.parameters())


def test_where_nothing_can_be_compiled_one_line_names_the_remedy(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch._inductor import config

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    with (
        config.patch({"cpp.cxx": (None, "no-such-compiler"), "fx_graph_cache": False}),
        pytest.raises(PolicyError, match=r"train.compile=true: torch.compile does not work here .*g\+\+") as caught,
    ):
        start(tmp_path / "run", True)
    assert "\n" not in str(caught.value)
    assert "install a C++ compiler and Python's headers (apt install g++ python3-dev), or" in str(caught.value)
    assert not (tmp_path / "run").exists()
