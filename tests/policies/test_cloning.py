"""The cloning loop: it learns, it resumes bit for bit, it stops cleanly, and processes share the work."""

from __future__ import annotations

import math
import os
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from flowsteer.policies.checkpoint import load_policy, resolve
from flowsteer.policies.cloning import Cloning
from flowsteer.policies.cloning_config import CloningConfig, learning_rate
from flowsteer.policies.errors import PolicyError
from flowsteer.policies.policy import Policy
from flowsteer.policies.random_state import seed_everything

CONFIG = CloningConfig(
    steps=12, warmup_steps=2, precision="float32", log_every=3, validate_every=0, evaluate_every=0, save_every=4
)


class Numbers:
    def __init__(self) -> None:
        self.rows: list[tuple[int, dict[str, float]]] = []

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.rows.append((step, dict(values)))

    def of(self, name: str) -> dict[int, float]:
        return {step: values[name] for step, values in self.rows if name in values}


@pytest.fixture
def make_run(
    make_policy: Callable[..., Policy], make_batches: Callable[..., Any], describe: Callable[[str], dict[str, Any]]
) -> Callable[..., Cloning]:
    def make(family: str, folder: Path | None = None, config: CloningConfig = CONFIG) -> Cloning:
        seed_everything(3)
        return Cloning(make_policy(family), config, make_batches(16), 16, folder=folder, describe=describe(family))

    return make


def same(a: Cloning, b: Cloning) -> bool:
    pairs = [(a.policy, b.policy), (a.ema.average, b.ema.average)]
    return all(torch.equal(p, q) for x, y in pairs for p, q in zip(x.parameters(), y.parameters(), strict=True))


def test_learning_rate_by_hand() -> None:
    config = CloningConfig(steps=110, warmup_steps=10, lr=2.0)
    assert learning_rate(0, config) == pytest.approx(0.2)
    assert learning_rate(10, config) == 2.0
    assert learning_rate(60, config) == pytest.approx(1.0)
    assert learning_rate(110, config) == pytest.approx(0.0)


def test_the_loss_falls(family: str, make_run: Callable[..., Cloning], make_batch: Callable[..., Any]) -> None:
    config = CloningConfig(steps=150, warmup_steps=5, lr=3e-3, precision="float32", save_every=0)
    run = make_run(family, config=config)
    before = run.validate([make_batch(64)])
    run.batches = iter(lambda: make_batch(64), None)  # type: ignore[assignment]
    run.batch_size = 64
    for _ in range(150):
        run.update(next(run.batches))
        run.progress.step += 1
    assert run.validate([make_batch(64)]) < before - 0.1


@pytest.mark.parametrize("stop_at", [4, 8])
def test_stop_and_resume_equals_never_stopping(
    family: str, stop_at: int, tmp_path: Path, make_run: Callable[..., Cloning]
) -> None:
    whole, log = make_run(family, tmp_path / "whole"), Numbers()
    assert whole.train(log)

    first = make_run(family, tmp_path / "part")
    for _ in range(stop_at):
        first._timed_update()
    first.save()
    second, resumed_log = make_run(family, tmp_path / "part"), Numbers()
    seed_everything(99)
    second.resume(tmp_path / "part")
    assert second.train(resumed_log)

    assert same(whole, second)
    assert log.of("train/loss")[12] == resumed_log.of("train/loss")[12]
    state, resumed = whole.state(), second.state()
    assert state.values | {"train_s": 0} == resumed.values | {"train_s": 0}
    assert all(torch.equal(value, resumed.tensors[key]) for key, value in state.tensors.items())


def test_resuming_restores_every_generator(tmp_path: Path, make_run: Callable[..., Cloning]) -> None:
    import random

    import numpy as np

    run = make_run("flow", tmp_path)
    run._timed_update()
    run.save()
    expected = (random.random(), np.random.rand(), torch.rand(1).item())
    seed_everything(1234)
    run.resume(tmp_path)
    assert (random.random(), np.random.rand(), torch.rand(1).item()) == expected


def test_validation_does_not_disturb_training(make_run: Callable[..., Cloning], make_batch: Callable[..., Any]) -> None:
    plain, validated = make_run("diffusion"), make_run("diffusion")
    plain.train(Numbers())
    config = CloningConfig(**{**vars(CONFIG), "validate_every": 5})
    validated.config = config
    log = Numbers()
    validated.train(log, validation=lambda: [make_batch(8), make_batch(3)])
    assert same(plain, validated)
    assert sorted(log.of("val/loss")) == [5, 10, 12]


def test_the_best_checkpoint_is_kept(tmp_path: Path, make_run: Callable[..., Cloning]) -> None:
    scores = {3: 0.2, 6: 0.9, 9: 0.4, 12: 0.9}

    def evaluate(policy: Policy, step: int) -> tuple[dict[str, float], float]:
        torch.rand(step)  # a simulator that draws from the global generator
        return {"eval/success": scores[step]}, scores[step]

    config = CloningConfig(**{**vars(CONFIG), "evaluate_every": 3})
    run, log = make_run("flow", tmp_path, config), Numbers()
    run.train(log, evaluate=evaluate)
    assert log.of("eval/success") == scores
    assert resolve(tmp_path / "best").name == "00000006"
    assert resolve(tmp_path).name == "00000012"
    assert same(run, make_and_train(make_run)), "evaluation must not change what is learnt"


def make_and_train(make_run: Callable[..., Cloning]) -> Cloning:
    run = make_run("flow")
    run.train(Numbers())
    return run


def test_a_signal_stops_after_saving(tmp_path: Path, make_run: Callable[..., Cloning]) -> None:
    run = make_run("flow", tmp_path)

    class Stopping(Numbers):
        def log(self, step: int, values: Mapping[str, float]) -> None:
            os.kill(os.getpid(), signal.SIGTERM)

    handler = signal.getsignal(signal.SIGTERM)
    assert not run.train(Stopping())
    assert signal.getsignal(signal.SIGTERM) is handler
    assert resolve(tmp_path).name == "00000003"


class Poisoned:
    """Batches of which one holds a NaN."""

    def __init__(self, make_batch: Callable[..., Any], at: int) -> None:
        self.make_batch, self.at, self.number = make_batch, at, 0

    def __next__(self) -> Any:
        batch = self.make_batch(16, self.number)
        if self.number == self.at:
            batch["action"][0, 0, 0] = math.nan
        self.number += 1
        return batch

    def state_dict(self) -> dict[str, Any]:
        return {}


@pytest.mark.parametrize(
    ("log_every", "message"),
    [(3, r"the loss is not finite at step 6: lower train.lr"), (100, r"the loss or a weight is not finite at step 8")],
)
def test_what_is_not_finite_never_replaces_a_good_checkpoint(
    log_every: int, message: str, tmp_path: Path, make_run: Callable[..., Cloning], make_batch: Callable[..., Any]
) -> None:
    run = make_run("flow", tmp_path, CloningConfig(**{**vars(CONFIG), "log_every": log_every}))
    run.batches = Poisoned(make_batch, at=5)  # type: ignore[assignment]
    with pytest.raises(PolicyError, match=message):
        run.train(Numbers())
    assert resolve(tmp_path).name == "00000004"
    assert all(torch.isfinite(p).all() for p in load_policy(tmp_path).parameters())


def test_everything_is_due_at_the_last_step(
    tmp_path: Path, make_run: Callable[..., Cloning], make_batch: Callable[..., Any]
) -> None:
    config = CloningConfig(**{**vars(CONFIG), "steps": 5, "log_every": 3, "validate_every": 4, "evaluate_every": 100})
    run, log = make_run("flow", tmp_path, config), Numbers()
    run.train(log, validation=lambda: [make_batch(8)], evaluate=lambda policy, step: ({"eval/success": 0.5}, 0.5))
    assert sorted(log.of("train/loss")) == [3, 5]
    assert sorted(log.of("val/loss")) == [4, 5]
    assert sorted(log.of("eval/success")) == [5]
    assert resolve(tmp_path / "best").name == "00000005"


def test_an_evaluation_that_fails_costs_nothing_of_what_was_learnt(
    tmp_path: Path, make_run: Callable[..., Cloning]
) -> None:
    def evaluate(policy: Policy, step: int) -> tuple[dict[str, float], float]:
        raise RuntimeError("the simulator died")

    run = make_run("flow", tmp_path, CloningConfig(**{**vars(CONFIG), "evaluate_every": 7}))
    with pytest.raises(RuntimeError, match="the simulator died"):
        run.train(Numbers(), evaluate=evaluate)
    assert resolve(tmp_path).name == "00000007"


def test_the_precision_can_be_changed_when_resuming(tmp_path: Path, make_run: Callable[..., Cloning]) -> None:
    run = make_run("flow", tmp_path)
    run._timed_update()
    run.save()
    for precision, dtype in (("auto", torch.float32), ("bfloat16", torch.bfloat16)):
        resumed = make_run("flow", tmp_path, CloningConfig(**{**vars(CONFIG), "precision": precision}))
        resumed.resume(tmp_path)
        assert resumed.dtype == dtype


def test_a_step_that_an_earlier_run_left_is_written_anew(tmp_path: Path, make_run: Callable[..., Cloning]) -> None:
    stale = tmp_path / "checkpoints" / "00000004"
    stale.mkdir(parents=True)
    (stale / "policy.safetensors").write_bytes(b"old")
    run = make_run("flow", tmp_path, CloningConfig(**{**vars(CONFIG), "steps": 4}))
    run.train(Numbers())
    assert all(torch.isfinite(p).all() for p in load_policy(tmp_path).parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, r"train.steps must be positive, got 0"),
        ({"grad_clip": 0.0}, r"train.grad_clip must be positive, got 0"),
        ({"lr": math.nan}, r"train.lr must be positive, got nan"),
        ({"lr": math.inf}, r"train.lr must be finite, got inf"),
        ({"warmup_steps": -5}, r"train.warmup_steps must not be negative, got -5"),
        ({"weight_decay": math.nan}, r"train.weight_decay must not be negative, got nan"),
        ({"ema_power": -0.5}, r"train.ema_power must not be negative, got -0.5"),
        ({"beta2": 1.0}, r"train.beta2 must be in \[0, 1\), got 1"),
        ({"beta2": -0.1}, r"train.beta2 must be in \[0, 1\), got -0.1"),
        ({"ema_max_decay": 2.0}, r"train.ema_max_decay must be in \[0, 1\), got 2"),
        ({"ema_max_decay": math.nan}, r"train.ema_max_decay must be in \[0, 1\), got nan"),
    ],
)
def test_impossible_hyper_parameters(options: dict[str, float], message: str) -> None:
    with pytest.raises(PolicyError, match=message):
        CloningConfig(**options)  # type: ignore[arg-type]


def test_an_unknown_precision_names_the_nearest(make_run: Callable[..., Cloning]) -> None:
    with pytest.raises(PolicyError, match=r"train.precision 'bf16' is unknown; nearest: bfloat16"):
        make_run("flow", config=CloningConfig(precision="bf16"))


def test_an_unfitted_normaliser_cannot_be_trained(make_policy: Callable[..., Policy], make_batches: Any) -> None:
    policy = make_policy("flow")
    policy.normalizer.get_buffer("scale:state").fill_(math.nan)
    with pytest.raises(PolicyError, match=r"scale:state is not finite"):
        Cloning(policy, CONFIG, make_batches(4), 4)


TRAIN = """
from flowsteer.policies.cloning import Cloning
from flowsteer.policies.cloning_config import CloningConfig

config = CloningConfig(steps=5, warmup_steps=1, precision="float32", log_every=1, save_every=0)
run = Cloning(kit._make_policy(family), config, kit.FakeBatches(16, rank, processes), 16, accelerator=accelerator)
losses = []
class Log:
    def log(self, step, values): losses.append(values["train/loss"])
run.train(Log())
result = [losses, [p.double().sum().item() for p in run.ema.average.parameters()]]
"""

RESUME = """
from functools import partial
from flowsteer.policies.cloning import Cloning
from flowsteer.policies.cloning_config import CloningConfig
from flowsteer.policies.denoising import FlowPolicy
from flowsteer.policies.random_state import seed_everything

folder = Path(run)
config = CloningConfig(steps=6, warmup_steps=1, precision="float32")
describe = {"policy": {}, "spec": kit.SPEC.to_dict()}
def make(seed):
    seed_everything(seed)
    policy = FlowPolicy(kit.SPEC, partial(kit.LowDim, noise=0.3), partial(kit.ResidualMLP, hidden=32, dropout=0.3))
    policy.fit_normalizer(kit._statistics(state=torch.randn(50, 3), action=torch.randn(50, 2)))
    batches = kit.FakeBatches(16, rank, processes)
    return Cloning(
        policy, config, batches, 16, seed=3, accelerator=accelerator, folder=folder, describe=describe
    )
def update(run, times):
    for _ in range(times):
        run._timed_update()
    return accelerator.gather(torch.rand(1)).tolist()
whole = make(3)
drawn = [update(whole, 3), update(whole, 3)]
part = make(3)
update(part, 3)
part.save()
accelerator.wait_for_everyone()
resumed = make(99)
resumed.resume(folder)
drawn.append(update(resumed, 3))
equal = all(torch.equal(p, q) for p, q in zip(whole.policy.parameters(), resumed.policy.parameters()))
result = [equal, drawn]
"""


@pytest.mark.parametrize("family", ["diffusion"], indirect=True)
def test_two_processes_equal_one_with_the_double_batch(family: str, run_processes: Callable[..., Any]) -> None:
    (losses, weights), (shared_losses, shared_weights) = (run_processes(TRAIN, n, family=family) for n in (1, 2))
    assert shared_losses == pytest.approx(losses, rel=1e-5)
    assert shared_weights == pytest.approx(weights, rel=1e-4, abs=1e-4)


def test_two_processes_resume_each_with_its_own_noise(run_processes: Callable[..., Any], tmp_path: Path) -> None:
    equal, (before, whole, resumed) = run_processes(RESUME, 2, run=str(tmp_path / "run"))
    assert len({*before, *whole}) == 4, "dropout and noise on observations differ between processes and steps"
    assert resumed == whole
    assert equal
