"""Real-time iteration against the plain policy, against hand-computed starts, and row by row against itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from flowsteer.policies.counting import counting
from flowsteer.policies.denoising import DenoisingPolicy, FlowPolicy
from flowsteer.policies.encoders.cameras import Cameras
from flowsteer.policies.encoders.low_dim import LowDim
from flowsteer.policies.encoders.vit import SmallViT
from flowsteer.policies.errors import PolicyError
from flowsteer.policies.networks.residual_mlp import ResidualMLP
from flowsteer.policies.policy import Policy
from flowsteer.policies.rti import RealTimeIteration, RtiOptions
from flowsteer.policies.rti_measures import Recorder, Situations, contraction
from flowsteer.policies.spec import ArraySpec, PolicySpec

Make = Callable[..., Policy]
OBS = {"state": torch.randn(6, 2, 3, generator=torch.Generator().manual_seed(0))}
FRESH, ONE = torch.zeros(6, dtype=torch.int64), torch.ones(6, dtype=torch.int64)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def generators(*seeds: int) -> list[torch.Generator]:
    return [generator(seed) for seed in seeds]


def rows_of(obs: dict[str, Tensor], *rows: int) -> dict[str, Tensor]:
    return {key: value[list(rows)] for key, value in obs.items()}


@pytest.fixture(params=["diffusion", "flow"])
def policy(request: pytest.FixtureRequest, make_policy: Make) -> DenoisingPolicy:
    """Weights that are nowhere zero, as after training."""
    made = make_policy(request.param)
    torch.manual_seed(1)
    for parameter in made.parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    assert isinstance(made, DenoisingPolicy)
    return made.eval()


def iterated(policy: Policy, start: float = 0.4, steps: int = 2, **options: Any) -> RealTimeIteration:
    return RealTimeIteration(policy, RtiOptions(start, steps, **options))


class Identity:
    """A denoiser that says what it is given, and keeps it."""

    def __init__(self, policy: DenoisingPolicy, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: list[Tensor] = []
        monkeypatch.setattr(policy, "_a_hat", self)

    def __call__(self, x_t: Tensor, *_: Any) -> Tensor:
        self.seen.append(x_t)
        return x_t


def test_without_a_previous_chunk_it_is_the_policy_bit_for_bit(policy: DenoisingPolicy) -> None:
    plain = policy.predict(OBS, generator=generators(*range(6)))
    assert torch.equal(iterated(policy, 1.0, 10).decide(OBS, executed=FRESH, generator=generators(*range(6))), plain)
    assert torch.equal(iterated(policy).decide(OBS, executed=ONE, generator=generators(*range(6))), plain)
    noise = torch.randn(6, 8, 2, generator=generator(5))
    assert torch.equal(iterated(policy).decide(OBS, executed=FRESH, noise=noise), policy.predict(OBS, noise=noise))
    together = iterated(policy).decide(OBS, executed=FRESH, generator=generator(1))
    assert torch.equal(together, policy.predict(OBS, generator=generator(1)))


def test_from_the_noise_nothing_of_the_previous_chunk_is_left(make_policy: Make) -> None:
    policy, noise = make_policy("flow"), torch.randn(6, 8, 2, generator=generator(0))
    previous = torch.randn(6, 8, 2, generator=generator(1))
    warm = iterated(policy, 1.0, 10).iterate(OBS, previous, ONE, noise=noise)
    assert torch.equal(warm, policy.predict(OBS, noise=noise))


def test_the_start_by_hand(make_policy: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = make_policy("flow")
    assert isinstance(policy, DenoisingPolicy)
    policy.clip = None
    scale = policy.normalizer.scale("action")
    previous = torch.arange(8.0)[None, :, None].expand(1, 8, 2)
    # 3 steps are executed: what was step 3 is now, and what lies beyond the end repeats its last action.
    shifted = torch.tensor([3.0, 4, 5, 6, 7, 7, 7, 7])[None, :, None].expand(1, 8, 2)
    one, executed = rows_of(OBS, 0), torch.tensor([3])
    guess = iterated(policy).guess(one, previous, executed)
    torch.testing.assert_close(guess, policy.normalizer.normalize("action", shifted))
    assert guess[0, 1, 0] - guess[0, 0, 0] == pytest.approx(scale[0].item(), rel=1e-4)
    network, noise = Identity(policy, monkeypatch), torch.randn(1, 8, 2, generator=generator(0))
    iterated(policy, 0.25, 1).refine(one, guess, noise=noise)
    iterated(policy, 0.25, 1, renoise=False).refine(one, guess, noise=noise)
    torch.testing.assert_close(network.seen[0], 0.75 * guess + 0.25 * noise)
    assert torch.equal(network.seen[1], guess)


def test_a_chunk_relative_to_an_observation_follows_it() -> None:
    """The same places on the table, seen from where the robot is now."""
    spec = PolicySpec({"position": ArraySpec((2,)), "goal": ArraySpec((1,))}, 3, 1, 4, 2, 10.0)
    policy = FlowPolicy(spec, LowDim, partial(ResidualMLP, hidden=8), relative_to="position", clip=None)
    for name, buffer in policy.normalizer.named_buffers():
        buffer.fill_(1.0 if name.startswith("scale") else 0.0)
    obs = {"position": torch.tensor([[[1.0, 2.0]]]), "goal": torch.zeros(1, 1, 1)}
    previous = torch.tensor([[[5.0, 5.0, 0.5]] * 4])
    guess = iterated(policy).guess(obs, previous, torch.tensor([1]))
    assert guess[0].tolist() == [[4.0, 3.0, 0.5]] * 4


def test_rows_of_a_batch_are_as_alone(policy: DenoisingPolicy) -> None:
    """Three decisions in which rows are fresh, gone on with, or absent; each alike alone, with its own generator."""
    together = iterated(policy)
    alone = [iterated(policy) for _ in range(6)]
    random, own = generators(*range(6)), generators(*range(6))
    for rows, executed in (
        ([0, 1, 2, 3, 4, 5], [0, 0, 0, 0, 0, 0]),
        ([5, 1, 3], [4, 0, 2]),
        ([0, 1, 3, 5], [3, 1, 4, 7]),
    ):
        obs = rows_of(OBS, *rows)
        index, steps = torch.tensor(rows), torch.tensor(executed)
        chunks = together.decide(obs, rows=index, executed=steps, generator=[random[row] for row in rows])
        for i, row in enumerate(rows):
            single = alone[row].decide(rows_of(OBS, row), executed=steps[[i]], generator=[own[row]])
            torch.testing.assert_close(chunks[[i]], single, atol=1e-5, rtol=1e-5)


def test_same_seeds_same_chunks(policy: DenoisingPolicy) -> None:
    def chunks() -> Tensor:
        rti, random = iterated(policy), generator(7)
        return torch.stack([rti.decide(OBS, executed=n * ONE, generator=random) for n in (0, 2, 4)])

    assert torch.equal(chunks(), chunks())


def evaluations(rti: RealTimeIteration, **arguments: Any) -> int:
    with counting(rti.policy) as counter:
        rti.decide(**{"obs": OBS, "executed": ONE, **arguments})
    assert counter.evaluations is not None
    return counter.evaluations


def test_a_warm_row_takes_its_few_steps_and_a_fresh_one_all(policy: DenoisingPolicy) -> None:
    rti = iterated(policy)
    assert evaluations(rti, executed=FRESH) == 6 * 10
    assert evaluations(rti) == 6 * 2
    # An episode begins in one row; of another's chunk of 8 nothing is left.
    assert evaluations(rti, executed=torch.tensor([0, 1, 1, 8, 1, 1])) == 2 * 10 + 4 * 2


@pytest.mark.parametrize(("rows", "fresh"), [(None, 6), ([1, 4], 2), ([99], 0)])
def test_a_reset_forgets(policy: DenoisingPolicy, rows: list[int] | None, fresh: int) -> None:
    rti = iterated(policy)
    evaluations(rti)
    rti.reset(rows)
    assert evaluations(rti) == fresh * 10 + (6 - fresh) * 2


def test_every_so_many_decisions_all_is_new(policy: DenoisingPolicy) -> None:
    rti = iterated(policy, refresh_every=3)
    assert [evaluations(rti) for _ in range(7)] == [60, 12, 12, 60, 12, 12, 60]
    rti = iterated(policy, refresh_every=0)
    assert [evaluations(rti) for _ in range(60)] == [60] + 59 * [12]


def test_a_jump_of_the_observation_makes_its_row_new(policy: DenoisingPolicy) -> None:
    rti, moved = iterated(policy, jump=0.5), OBS["state"].clone()
    evaluations(rti)
    unit = 1 / policy.normalizer.scale("state")
    # Only now is looked at, one number of one row goes beyond the bound, another stays below it.
    moved[:, 0] += 100
    moved[2, 1, 0] += 0.6 * unit[0]
    moved[3, 1, 1] -= 0.4 * unit[1]
    assert evaluations(rti, obs={"state": moved}) == 10 + 5 * 2
    assert evaluations(rti, obs={"state": moved}) == 6 * 2


def gripper_policy(make_statistics: Callable[..., Any], scale: float = 1.0) -> FlowPolicy:
    """Two joints and a gripper that is 0 or 0.08 m open."""
    spec = PolicySpec({"x": ArraySpec((3,))}, 3, 1, 4, 2, 10.0, discrete=(2,), discrete_scale=scale)
    policy = FlowPolicy(spec, LowDim, partial(ResidualMLP, hidden=8))
    action = torch.tensor([[-1.0, -1.0, 0.0], [1.0, 1.0, 0.08]])
    policy.fit_normalizer(make_statistics(x=torch.randn(9, 3), action=action))
    return policy.eval()


@pytest.mark.parametrize("scale", [1.0, 0.1])
def test_the_gripper_takes_one_of_its_two_values(scale: float, make_statistics: Callable[..., Any]) -> None:
    policy = gripper_policy(make_statistics, scale)
    obs, executed = {"x": torch.zeros(2, 1, 3)}, torch.tensor([1, 1])
    previous = torch.tensor([0.3, -0.2, 0.05]).expand(2, 4, 3).clone()
    previous[1, :, 2] = 0.03
    guess = iterated(policy, discrete_weight=0.5).guess(obs, previous, executed)
    torch.testing.assert_close(guess[:, 0], torch.tensor([[0.3, -0.2, 0.5 * scale], [0.3, -0.2, -0.5 * scale]]))
    kept = iterated(policy, binarise=False).guess(obs, previous, executed)
    torch.testing.assert_close(kept[:, 0, 2], torch.tensor([0.25, -0.25]) * scale)
    noise = torch.randn(2, 4, 3, generator=generator(0))
    values = iterated(policy).decide(obs, executed=executed, noise=noise)[..., 2]
    assert ((values - 0.0).abs().minimum((values - 0.08).abs()) < 1e-6).all()
    assert torch.equal(
        iterated(policy, binarise=False).decide(obs, executed=executed, noise=noise), policy.predict(obs, noise=noise)
    )


def test_the_grid_is_embedded_once(policy: DenoisingPolicy, monkeypatch: pytest.MonkeyPatch) -> None:
    embed, calls = type(policy.network).embed_time, []
    monkeypatch.setattr(type(policy.network), "embed_time", lambda self, t: calls.append(len(t)) or embed(self, t))
    rti = iterated(policy, 0.4, 2)
    rti.decide(OBS, executed=FRESH)
    assert calls == [2, 10]
    for _ in range(3):
        rti.decide(OBS, executed=ONE)
    assert calls == [2, 10]


@pytest.mark.parametrize(("family", "name"), [("gaussian", "GaussianPolicy"), ("ebt", "EnergyPolicy")])
def test_what_does_not_denoise_is_refused_by_name(make_policy: Make, family: str, name: str) -> None:
    with pytest.raises(PolicyError, match=rf"and {name} does not denoise: use policy=diffusion or policy=flow"):
        iterated(make_policy(family))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "rti.steps must be at least 1, got 0"),
        ({"start": 0.0}, r"rti.start must be in \(0, 1\], got 0"),
        ({"start": 1.1}, r"rti.start must be in \(0, 1\], got 1.1"),
        ({"start": float("nan")}, r"rti.start must be in \(0, 1\], got nan"),
        ({"refresh_every": -1}, "rti.refresh_every must not be negative, got -1"),
        ({"jump": -0.1}, "rti.jump must not be negative, got -0.1"),
        ({"discrete_weight": 2.0}, r"rti.discrete_weight must be in \[0, 1\], got 2"),
    ],
)
def test_options_out_of_their_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PolicyError, match=message):
        replace(RtiOptions(0.5, 2), **options)


def test_a_start_that_the_network_has_not_learnt_is_refused(make_policy: Make) -> None:
    message = r"rti.steps=1 from rti.start=0.005 asks .* t = 0.005, .* t = 0.01 on: lower rti.steps or raise rti.start"
    with pytest.raises(PolicyError, match=message):
        iterated(make_policy("diffusion"), 0.005, 1)
    spec = PolicySpec({"x": ArraySpec((3,))}, 2, 1, 4, 2, 10.0)
    eps = FlowPolicy(spec, LowDim, ResidualMLP, prediction="eps", start=0.9)
    with pytest.raises(PolicyError, match=r"policy.prediction=eps divides by alpha, .* set rti.start=0.99"):
        iterated(eps, 1.0, 2)


@pytest.mark.parametrize(("distilled", "steps"), [(2, 1), (2, 2), (1, 2)])
def test_a_student_jumps_only_where_it_has_learnt_to(make_policy: Make, distilled: int, steps: int) -> None:
    policy = make_policy("flow")
    assert isinstance(policy, DenoisingPolicy)
    policy.fixed_steps = 1
    iterated(policy, 0.4, 1)
    policy.fixed_steps = distilled
    with pytest.raises(PolicyError, match=rf"rti.steps={steps}: this policy was distilled to {distilled}, .* teacher"):
        iterated(policy, 0.4, steps)


def test_images_alone_do_not_jump() -> None:
    spec = PolicySpec({"front": ArraySpec((24, 24, 3), "uint8")}, 2, 1, 4, 2, 10.0)
    encoder = partial(Cameras, backbone=partial(SmallViT, embed_dim=16, heads=2, features=5))
    policy = FlowPolicy(spec, encoder, partial(ResidualMLP, hidden=8))
    with pytest.raises(PolicyError, match=r"rti.jump=0.5: the policy observes images only, set rti.jump=0"):
        iterated(policy, jump=0.5)
    for name, buffer in policy.normalizer.named_buffers():
        buffer.fill_(1.0 if name.startswith("scale") else 0.0)
    rti, obs = iterated(policy), {"front": torch.randint(256, (2, 1, 24, 24, 3), dtype=torch.uint8)}
    assert [evaluations(rti, obs=obs, executed=torch.tensor([1, 1])) for _ in range(2)] == [20, 4]


@pytest.mark.parametrize(
    ("previous", "executed", "message"),
    [
        (torch.zeros(5, 8, 2), ONE, r"previous chunks must have shape \[6, 8, 2\], got \[5, 8, 2\]"),
        (torch.zeros(6, 4, 2), ONE, r"previous chunks must have shape \[6, 8, 2\], got \[6, 4, 2\]"),
        (torch.full((6, 8, 2), torch.nan), ONE, "a previous chunk is not finite: the policy has diverged"),
        (torch.zeros(6, 8, 2), 8 * ONE, "8 steps of a chunk of 8 are executed: nothing of it is left"),
        (torch.zeros(6, 8, 2), -ONE, "executed must not be negative, got -1"),
        (torch.zeros(6, 8, 2), 8, "executed must be a tensor with a row for each observation, got 8"),
        (
            torch.zeros(6, 8, 2),
            torch.tensor(8),
            "executed must be a tensor with a row for each observation, got tensor",
        ),
        (torch.zeros(6, 8, 2), ONE.float(), "executed must count control steps, got torch.float32"),
        (torch.zeros(6, 8, 2), ONE[:3], r"executed must have 6 rows as the observations have, got \[3\]"),
    ],
)
def test_previous_chunks_that_do_not_fit(make_policy: Make, previous: Tensor, executed: Tensor, message: str) -> None:
    with pytest.raises(PolicyError, match=message):
        iterated(make_policy("flow")).iterate(OBS, previous, executed)


def test_batches_that_do_not_fit(make_policy: Make) -> None:
    rti = iterated(make_policy("flow"))
    with pytest.raises(PolicyError, match=r"rows must have 6 rows as the observations have, got \[2\]"):
        rti.decide(OBS, executed=ONE, rows=torch.tensor([0, 1]))
    for wrong in (torch.zeros(6, 1, 2), torch.zeros(6, 8, 1)):
        with pytest.raises(PolicyError, match=r"noise must have shape \[6, 8, 2\], got \[6, "):
            rti.iterate(OBS, torch.zeros(6, 8, 2), ONE, noise=wrong)
    with pytest.raises(PolicyError, match=r"rows must be different and not negative, got \[0, 1, 2, 3, 4, 4\]"):
        rti.decide(OBS, executed=ONE, rows=torch.tensor([0, 1, 2, 3, 4, 4]))
    with pytest.raises(PolicyError, match=r"rows must be different and not negative, got \[-1\]"):
        rti.reset([-1])
    with pytest.raises(PolicyError, match=r"noise must have 6 rows as the observations have, got \[1, 8, 2\]"):
        rti.decide(OBS, executed=ONE, noise=torch.zeros(1, 8, 2))
    with pytest.raises(PolicyError, match=r"observation 'state' is missing; got \['stat'\]"):
        rti.decide({"stat": OBS["state"]}, executed=ONE)


def test_a_chunk_that_is_not_finite_is_not_gone_on_with(make_policy: Make) -> None:
    policy = make_policy("flow")
    rti = iterated(policy)
    rti.decide(OBS, executed=FRESH, noise=torch.full((6, 8, 2), torch.nan))
    with pytest.raises(PolicyError, match="a previous chunk is not finite"):
        rti.decide(OBS, executed=ONE)
    assert rti.decide(OBS, executed=FRESH, generator=generator(0)).isfinite().all()


def test_a_recorder_decides_as_the_policy(policy: DenoisingPolicy) -> None:
    recorder, rows, moved = Recorder(policy), torch.arange(6), {"state": OBS["state"] + 0.1}
    assert recorder.situations() is None
    first = recorder.decide(OBS, executed=FRESH, rows=rows, generator=generators(*range(6)))
    assert torch.equal(first, policy.predict(OBS, generator=generators(*range(6))))
    recorder.decide(moved, executed=3 * ONE, rows=rows, generator=generators(*range(6)))
    # An episode begins where row 1 was: it is no situation to go on from.
    two = rows_of(OBS, 0, 1)
    recorder.decide(two, executed=torch.tensor([3, 0]), rows=rows[:2], generator=generators(0, 1))
    kept = recorder.situations()
    assert kept is not None
    assert torch.equal(kept.obs["state"], torch.stack([moved["state"][0], OBS["state"][0]]))
    assert torch.equal(kept.previous[0], first[0])
    assert kept.executed.tolist() == [3, 3]
    change = 0.1 * policy.normalizer.scale("state").abs().max().item()
    assert recorder.usual_change() == pytest.approx(change, rel=1e-3)
    # Now and then an angle wraps around.
    for wrapped in [False] * 60 + [True]:
        for obs in (OBS, {"state": OBS["state"] + (9.0 if wrapped else 0.1)}):
            recorder.decide(obs, executed=ONE, rows=rows, generator=generators(*range(6)))
    assert recorder.usual_change() == pytest.approx(change, rel=1e-3)
    assert Recorder(policy).usual_change() == 0


def test_contraction_by_hand(make_policy: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = make_policy("flow")
    assert isinstance(policy, DenoisingPolicy)
    situations = Situations(OBS, torch.randn(6, 8, 2, generator=generator(0)), ONE)
    # A denoiser that believes half of what it sees: of an error e at t = 0.4, 0.6 e is put on the path, 0.3 e is left.
    monkeypatch.setattr(policy, "_a_hat", lambda x_t, *_: 0.5 * x_t)
    torch.testing.assert_close(contraction(iterated(policy, 0.4, 1), situations), torch.full((6,), 0.3))
    torch.testing.assert_close(contraction(iterated(policy, 1.0, 1), situations), torch.zeros(6))
    # The chunk is 0.5 x at t = 0.2, where x = 0.8 a_hat + 0.2 eps_hat, with eps_hat = (x_start - 0.6 a_hat) / 0.4.
    two = 0.6 * (0.8 * 0.5 + 0.2 * (1 - 0.6 * 0.5) / 0.4) * 0.5
    torch.testing.assert_close(contraction(iterated(policy, 0.4, 2), situations), torch.full((6,), two))


def test_options_survive_a_config() -> None:
    options = RtiOptions(0.5, 2, jump=1.5)
    assert RtiOptions(**asdict(options)) == options


def test_evaluations_are_counted_by_rows(make_policy: Make) -> None:
    policy = make_policy("flow")
    with counting(policy) as counter:
        policy.predict(OBS)
    policy.predict(OBS)
    assert counter.evaluations == 6 * 10
    with counting(make_policy("gaussian")) as counter:
        pass
    assert counter.evaluations is None
