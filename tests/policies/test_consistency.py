"""The family of consistency policies: its jumps, what it takes over from a teacher, and what else works on it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flowsteer.policies.checkpoint import TrainerState, load_policy, save_checkpoint
from flowsteer.policies.consistency import ConsistencyPolicy, make_student, make_teacher, student_config
from flowsteer.policies.denoising import DenoisingPolicy, DiffusionPolicy, FlowPolicy
from flowsteer.policies.encoders.low_dim import LowDim
from flowsteer.policies.engine import compile_act, likely_observations
from flowsteer.policies.errors import PolicyError
from flowsteer.policies.networks.residual_mlp import ResidualMLP
from flowsteer.policies.networks.staged import StagedNetwork
from flowsteer.policies.paths import LinearPath, VariancePreservingPath, linear_betas
from flowsteer.policies.policy import Policy
from flowsteer.policies.samplers import transition
from flowsteer.policies.spec import ArraySpec, PolicySpec

SPEC = PolicySpec({"state": ArraySpec((3,))}, 2, 2, 8, 4, 10.0)
NETWORK = partial(ResidualMLP, hidden=16, blocks=1)
PATHS = {"linear": LinearPath, "variance_preserving": VariancePreservingPath}
FAMILIES = ["diffusion", "flow"]


def random_(policy: Policy) -> Any:
    """No layer is left at 0, and the normaliser is the identity."""
    for parameter in policy.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.2)
    for name, buffer in policy.normalizer.named_buffers():
        buffer.fill_(1.0 if name.startswith("scale") else 0.0)
    return policy.eval()


def consistency(path: str, prediction: str, **options: Any) -> ConsistencyPolicy:
    torch.manual_seed(0)
    numbers = {"prediction": prediction, "min_time": 1e-2, **options}
    return random_(ConsistencyPolicy(SPEC, LowDim, NETWORK, PATHS[path](), **numbers))


@pytest.fixture(params=FAMILIES)
def taught(
    request: pytest.FixtureRequest, make_policy: Callable[..., Policy], describe: Callable[[str], dict[str, Any]]
) -> tuple[DenoisingPolicy, dict[str, Any]]:
    """A teacher and the "policy" of its checkpoint."""
    teacher = make_policy(request.param)
    for parameter in teacher.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return make_teacher(teacher), describe(request.param)["policy"]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("prediction", ["eps", "x0", "v", "velocity"])
def test_nothing_is_changed_at_the_clean_end(path: str, prediction: str) -> None:
    policy = consistency(path, prediction, start=0.9, clip=None)
    cond = policy.encode(likely_observations(policy, 3, torch.Generator().manual_seed(0)))

    @settings(max_examples=20, deadline=None)
    @given(st.integers(0, 2**31))
    def holds(seed: int) -> None:
        x = 5 * torch.randn(3, 8, 2, generator=torch.Generator().manual_seed(seed))
        assert policy.denoise(x, torch.zeros(3), cond).equal(x)

    holds()


def test_the_jump_by_hand() -> None:
    # At t = b both coefficients are known: c_skip = 1/2, c_out = sqrt(1/2).
    policy = consistency("linear", "x0", boundary=0.25, clip=None)
    policy.network.output.weight.data.zero_()  # type: ignore[union-attr,operator]
    policy.network.output.bias.data.fill_(3.0)  # type: ignore[union-attr,operator]
    cond = policy.encode(likely_observations(policy, 1, torch.Generator()))
    jumped = policy.denoise(torch.ones(1, 8, 2), torch.tensor([0.25]), cond)
    torch.testing.assert_close(jumped, torch.full((1, 8, 2), 0.5 + 3 * 0.5**0.5))


def test_one_step_is_one_evaluation_of_denoise(taught: tuple[DenoisingPolicy, dict[str, Any]]) -> None:
    teacher, config = taught
    student = make_student(teacher, student_config(teacher, config, 1)).eval()
    obs = likely_observations(student, 4, torch.Generator().manual_seed(0))
    noise = torch.randn(4, 8, 2, generator=torch.Generator().manual_seed(1))
    calls = []
    student.network.register_forward_hook(lambda *_: calls.append(1))
    chunk = student.predict(obs, noise=noise)
    assert len(calls) == 1
    with torch.no_grad():
        torch.testing.assert_close(
            student.physical(student.denoise(noise, torch.ones(4), student.encode(obs)), obs), chunk
        )
    assert student.act(obs, noise=noise).equal(student.act(obs, noise=noise))


def test_a_student_starts_as_its_teacher(taught: tuple[DenoisingPolicy, dict[str, Any]]) -> None:
    teacher, config = taught
    student = make_student(teacher, student_config(teacher, config, 2)).eval()
    obs = likely_observations(student, 4, torch.Generator().manual_seed(0))
    x, t = torch.randn(4, 8, 2), torch.tensor([1.0, 0.9, 0.7, 0.5])
    with torch.no_grad():
        expected, started = (policy.denoise(x, t, policy.encode(obs)) for policy in (teacher, student))
    assert (expected - started).abs().max() < 2e-3
    learns = {name for name, parameter in student.named_parameters() if parameter.requires_grad}
    assert learns == {name for name, _ in student.named_parameters() if name.startswith("network.")}


def test_a_student_of_a_fine_tuned_teacher_takes_the_tuned_network() -> None:
    config = {
        "_target_": "flowsteer.policies.denoising.FlowPolicy",
        "encoder": {"_target_": "flowsteer.policies.encoders.low_dim.LowDim", "_partial_": True},
        "network": {
            "_target_": "flowsteer.policies.networks.staged.StagedNetwork",
            "_partial_": True,
            "switch": 0.45,
            "network": {
                "_target_": "flowsteer.policies.networks.residual_mlp.ResidualMLP",
                "_partial_": True,
                "hidden": 16,
            },
        },
        "eta": 1.0,
    }
    staged = partial(StagedNetwork, network=partial(ResidualMLP, hidden=16), switch=0.45)
    teacher = make_teacher(random_(FlowPolicy(SPEC, LowDim, staged, eta=1.0)))
    student = make_student(teacher, student_config(teacher, config, 1))
    assert teacher.eta == 0.0
    assert isinstance(student.network, ResidualMLP)
    for parameter, tuned in zip(student.network.parameters(), teacher.network.late.parameters(), strict=True):
        assert parameter.equal(tuned)


def test_a_checkpoint_rebuilds_the_student(taught: tuple[DenoisingPolicy, dict[str, Any]], tmp_path: Path) -> None:
    teacher, config = taught
    described = student_config(teacher, config, 3)
    student = make_student(teacher, described).eval()
    save_checkpoint(
        tmp_path / "c", student, student, {"policy": described, "spec": SPEC.to_dict()}, TrainerState({}, {})
    )
    loaded = load_policy(tmp_path / "c")
    obs = likely_observations(student, 2, torch.Generator().manual_seed(0))
    noise = torch.randn(2, 8, 2)
    assert type(loaded) is ConsistencyPolicy
    assert loaded.act(obs, noise=noise).equal(student.act(obs, noise=noise))


def test_the_path_of_the_teacher_is_kept() -> None:
    teacher = make_teacher(random_(DiffusionPolicy(SPEC, LowDim, NETWORK, betas="linear", train_steps=50)))
    path = student_config(teacher, {"network": {"_target_": "x"}, "encoder": {}}, 1)["path"]
    assert path["train_steps"] == 50
    assert path["betas"]["_target_"] == f"{linear_betas.__module__}.linear_betas"


def test_steps_land_on_the_trajectory_that_the_transition_leads_to() -> None:
    policy = consistency("variance_preserving", "v", steps=2, clip=None)
    obs = likely_observations(policy, 2, torch.Generator().manual_seed(0))
    noise, (t, s, end) = torch.randn(2, 8, 2), policy.grid
    with torch.no_grad():
        cond = policy.encode(obs)
        x_s = transition(policy.path, noise, policy.denoise(noise, t.expand(2), cond), t, s, 0.0).mean
        chunk = transition(policy.path, x_s, policy.denoise(x_s, s.expand(2), cond), s, end, 0.0).mean
    torch.testing.assert_close(policy.predict(obs, noise=noise), chunk)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps must be from 1 to 4 in a consistency policy, got 0"),
        ({"steps": 5}, "steps must be from 1 to 4 in a consistency policy, got 5"),
        ({"solver": "heun"}, r"policy\.solver=heun follows an ODE, a consistency policy jumps"),
        ({"boundary": 0.0}, r"policy\.boundary must be positive, got 0"),
    ],
)
def test_impossible_students(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PolicyError, match=message):
        consistency("linear", "velocity", **options)


def test_other_steps_than_it_was_distilled_to_are_refused() -> None:
    policy = consistency("linear", "velocity", steps=2)
    policy.set_steps(2)
    with pytest.raises(PolicyError, match=r"steps=4: this policy was distilled to 2, distill another one with steps=4"):
        policy.set_steps(4)
    with pytest.raises(PolicyError, match=r"steps=1: this policy was distilled to 2"):
        compile_act(policy, steps=1, engine="eager")


def test_there_is_no_denoising_loss(make_batch: Callable[..., Any]) -> None:
    with pytest.raises(PolicyError, match=r"has no denoising loss: it learns from its teacher, with flowsteer distill"):
        consistency("linear", "velocity").loss(make_batch(4))


@pytest.mark.parametrize("family", ["gaussian", "ebt"])
def test_a_family_that_has_no_steps_is_no_teacher(family: str, make_policy: Callable[..., Policy]) -> None:
    with pytest.raises(
        PolicyError, match=r"^(Gaussian|Energy)Policy cannot be distilled: name a diffusion or flow policy"
    ):
        make_teacher(make_policy(family))


def test_a_student_is_no_teacher() -> None:
    with pytest.raises(PolicyError, match=r"^ConsistencyPolicy cannot be distilled"):
        make_teacher(consistency("linear", "velocity"))


def test_a_student_of_more_steps_than_its_teacher(taught: tuple[DenoisingPolicy, dict[str, Any]]) -> None:
    teacher, config = copy.deepcopy(taught)
    teacher.set_steps(2)
    with pytest.raises(PolicyError, match=r"a student of steps=3 has nothing to learn from a teacher of 2: lower"):
        make_student(teacher, student_config(teacher, config, 3))


@pytest.mark.parametrize("steps", [1, 3])
def test_an_engine_of_a_student(steps: int) -> None:
    policy = consistency("variance_preserving", "v", steps=steps)
    act = compile_act(policy, batch=2, engine="eager")
    obs, noise = likely_observations(policy, 2, torch.Generator().manual_seed(0)), torch.randn(2, 8, 2)
    torch.testing.assert_close(act(obs, noise=noise), policy.act(obs, noise=noise))


@pytest.mark.parametrize("path", PATHS)
def test_a_student_as_onnx(path: str, tmp_path: Path) -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    from flowsteer.policies.onnx_export import export_onnx

    assert export_onnx(consistency(path, "v", steps=2), tmp_path / "policy.onnx") < 1e-4
