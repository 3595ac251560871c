"""What a student learns: both losses by hand, and the loop of cloning trains them, stops and resumes exactly."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from flowsteer.policies.checkpoint import load_policy
from flowsteer.policies.cloning import Cloning
from flowsteer.policies.cloning_config import CloningConfig
from flowsteer.policies.consistency import ConsistencyPolicy, make_student, make_teacher, student_config
from flowsteer.policies.denoising import DenoisingPolicy
from flowsteer.policies.distillation import Distillation
from flowsteer.policies.errors import PolicyError
from flowsteer.policies.policy import Policy
from flowsteer.policies.random_state import seed_everything

CONFIG = CloningConfig(
    steps=6, warmup_steps=2, precision="float32", log_every=2, validate_every=3, evaluate_every=0, save_every=0
)
LOSSES = {"same_noise": (1.0, 0.0), "consistency": (0.0, 1.0), "both": (1.0, 0.5)}


class Silent:
    def log(self, step: int, values: Mapping[str, float]) -> None:
        pass


Pair = tuple[DenoisingPolicy, ConsistencyPolicy, dict[str, Any]]


@pytest.fixture
def make_pair(make_policy: Callable[..., Policy], describe: Callable[[str], dict[str, Any]]) -> Callable[..., Pair]:
    """Family, steps of the student -> teacher, student, and what a checkpoint says of the student."""

    def make(family: str = "flow", steps: int = 1, teacher_steps: int = 4) -> Pair:
        policy = make_policy(family)
        for parameter in policy.parameters():
            if not parameter.any():
                torch.nn.init.normal_(parameter, std=0.2)
        teacher = make_teacher(policy, teacher_steps)
        # Untrained, it would be clipped most of the time.
        teacher.clip = None
        config = student_config(teacher, describe(family)["policy"], steps)
        return teacher, make_student(teacher, config), {"policy": config, "spec": teacher.spec.to_dict()}

    return make


def test_the_same_noise_loss_by_hand(make_pair: Callable[..., Pair], make_batch: Callable[..., Any]) -> None:
    teacher, student, _ = make_pair()
    batch, objective = make_batch(5), Distillation(student, student, teacher)
    draws = objective.draw(5, torch.Generator().manual_seed(0))
    scale = teacher.normalizer.scale("action")
    wanted, chunk = (policy.predict(batch["obs"], noise=draws[1]) for policy in (teacher, unclipped(student)))
    loss = objective.loss(batch, draws)
    torch.testing.assert_close(loss.total, ((wanted - chunk) * scale).square().mean())
    assert set(loss.parts) == {"same_noise"}


def unclipped(student: ConsistencyPolicy) -> ConsistencyPolicy:
    free = copy.deepcopy(student)
    free.clip = None
    return free.eval()


@pytest.mark.parametrize(("steps", "landings"), [(1, [0, 0, 0, 0]), (2, [0.5, 0.5, 0, 0]), (3, None)])
def test_the_grid_is_both_grids(steps: int, landings: list[float] | None, make_pair: Callable[..., Pair]) -> None:
    teacher, student, _ = make_pair(steps=steps)
    objective = Distillation(student, student, teacher)
    if landings is None:
        # A third of the way is none of the teacher's times.
        torch.testing.assert_close(objective.grid, torch.tensor([1, 0.75, 2 / 3, 0.5, 1 / 3, 0.25, 0]))
        landings = [2 / 3, 2 / 3, 1 / 3, 1 / 3, 0, 0]
    torch.testing.assert_close(objective.landings, torch.tensor(landings, dtype=torch.float32))


def constant(policy: DenoisingPolicy, a_hat: float) -> None:
    """Let a flow policy predict this chunk from everywhere."""
    policy.to_clean = lambda path, x, out, t: out
    policy.network.output.weight.data.zero_()  # type: ignore[union-attr,operator]
    policy.network.output.bias.data.fill_(a_hat)  # type: ignore[union-attr,operator]


@pytest.mark.parametrize(("steps", "lands"), [(1, [1, 1, 1, 1]), (2, [1 / 2, 1 / 3, 1, 1])])
@pytest.mark.parametrize("miss", [0.0, 0.5])
def test_both_losses_by_hand(
    steps: int, lands: list[float], miss: float, make_pair: Callable[..., Pair], make_batch: Callable[..., Any]
) -> None:
    # From t, a student that is d off lands (1 - s) - (1 - t) s / t of d off: t = 1, 3/4 land on s = 1/2 or 0.
    teacher, student, _ = make_pair(steps=steps)
    target = copy.deepcopy(student)
    for policy, a_hat in ((teacher, 0.25), (target, 0.25), (student, 0.25 + miss)):
        constant(policy, a_hat)
    parts = Distillation(student, target, teacher, consistency=1.0).loss(make_batch(12)).parts
    torch.testing.assert_close(parts["same_noise"], torch.tensor(miss**2), atol=1e-6, rtol=1e-5)
    expected = miss**2 * torch.tensor(lands, dtype=torch.float32).square().mean()
    torch.testing.assert_close(parts["consistency"], expected, atol=1e-6, rtol=1e-5)


def test_all_steps_are_drawn_alike(make_pair: Callable[..., Pair]) -> None:
    teacher, student, _ = make_pair()
    objective = Distillation(student, student, teacher)
    k, eps = objective.draw(12, torch.Generator().manual_seed(0))
    assert k.bincount().tolist() == [3, 3, 3, 3]
    assert eps.shape == (12, 8, 2)
    generator = torch.Generator().manual_seed(0)
    assert len({int(objective.draw(1, generator)[0]) for _ in range(40)}) == 4


def test_only_the_student_learns(make_pair: Callable[..., Pair], make_batch: Callable[..., Any]) -> None:
    teacher, student, _ = make_pair("diffusion", steps=2)
    target = copy.deepcopy(student)
    Distillation(student, target, teacher, consistency=1.0).loss(make_batch(8)).total.backward()
    assert all(p.grad is not None for p in student.network.parameters())
    assert all(p.grad is None for part in (student.encoder, target, teacher) for p in part.parameters())


@pytest.mark.parametrize(("family", "loss"), [("flow", "same_noise"), ("flow", "consistency"), ("diffusion", "both")])
def test_the_student_comes_nearer_to_its_teacher(
    family: str, loss: str, make_pair: Callable[..., Pair], make_batch: Callable[..., Any], make_batches: Any
) -> None:
    teacher, student, _ = make_pair(family)
    config = CloningConfig(steps=150, warmup_steps=5, lr=2e-3, precision="float32", ema_max_decay=0.9)
    objective = partial(Distillation, teacher=teacher, same_noise=LOSSES[loss][0], consistency=LOSSES[loss][1])
    run = Cloning(student, config, make_batches(32), 32, objective=lambda student, average: objective(student, average))
    obs, noise = make_batch(64, 1000)["obs"], torch.randn(64, 8, 2, generator=torch.Generator().manual_seed(7))
    wanted = teacher.predict(obs, noise=noise)

    def error() -> float:
        return (run.ema.average.predict(obs, noise=noise) - wanted).square().mean().item()

    before = error()
    for _ in range(config.steps):
        run._timed_update()
    assert error() < 0.5 * before, (error(), before)


@pytest.mark.parametrize("loss", LOSSES)
def test_stop_and_resume_equals_never_stopping(
    loss: str, tmp_path: Path, make_pair: Callable[..., Pair], make_batch: Callable[..., Any], make_batches: Any
) -> None:
    def make(folder: str) -> Cloning:
        seed_everything(3)
        teacher, student, describe = make_pair("diffusion", steps=2)
        weights = LOSSES[loss]
        return Cloning(
            student,
            CONFIG,
            make_batches(16),
            16,
            folder=tmp_path / folder,
            describe=describe,
            objective=lambda student, average: Distillation(student, average, teacher, *weights),  # type: ignore[arg-type]
        )

    whole, first = make("whole"), make("part")
    assert whole.train(Silent(), validation=lambda: [make_batch(8)])
    for _ in range(4):
        first._timed_update()
    first.save()
    second = make("part")
    seed_everything(99)
    second.resume(tmp_path / "part")
    assert second.train(Silent())
    for one, other in ((whole.policy, second.policy), (whole.ema.average, second.ema.average)):
        assert all(p.equal(q) for p, q in zip(one.parameters(), other.parameters(), strict=True))
    assert type(load_policy(tmp_path / "part")) is ConsistencyPolicy


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ((0.0, 0.0), r"loss\.same_noise and loss\.consistency are both 0: there is nothing to learn"),
        ((-1.0, 1.0), r"loss\.same_noise must be finite and not negative, got -1"),
        ((1.0, math.inf), r"loss\.consistency must be finite and not negative, got inf"),
    ],
)
def test_impossible_weights(weights: tuple[float, float], message: str, make_pair: Callable[..., Pair]) -> None:
    teacher, student, _ = make_pair()
    with pytest.raises(PolicyError, match=message):
        Distillation(student, student, teacher, *weights)
