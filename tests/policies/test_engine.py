from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from flowsteer.datasets.key_statistics import KeyStatistics
from flowsteer.policies import engine, few_rows
from flowsteer.policies.denoising import DiffusionPolicy, FlowPolicy
from flowsteer.policies.ebt import EnergyPolicy
from flowsteer.policies.encoders.cameras import Cameras
from flowsteer.policies.encoders.low_dim import LowDim
from flowsteer.policies.encoders.vit import SmallViT
from flowsteer.policies.engine import compile_act
from flowsteer.policies.errors import PolicyError
from flowsteer.policies.few_rows import PackedLinear
from flowsteer.policies.gaussian import GaussianPolicy
from flowsteer.policies.networks.residual_mlp import ResidualMLP
from flowsteer.policies.networks.staged import StagedNetwork
from flowsteer.policies.networks.unet1d import ConditionalUnet1d
from flowsteer.policies.short_convolutions import Windows
from flowsteer.policies.spec import ArraySpec, PolicySpec

SPEC = PolicySpec({"state": ArraySpec((3,)), "finger": ArraySpec((2,))}, 2, 2, 6, 3, 10.0)
SEEN = PolicySpec({"camera": ArraySpec((20, 20, 3), "uint8")}, 2, 1, 6, 3, 10.0)
MLP = partial(ResidualMLP, hidden=16, blocks=1)
FAMILIES = {
    "diffusion": partial(DiffusionPolicy, encoder=LowDim, network=MLP, steps=3),
    "ddpm": partial(DiffusionPolicy, encoder=LowDim, network=MLP, steps=3, eta=1.0),
    "flow": partial(FlowPolicy, encoder=LowDim, network=MLP, steps=3),
    "flow_sde": partial(FlowPolicy, encoder=LowDim, network=MLP, steps=2, eta=0.5, relative_to="finger"),
    "staged": partial(FlowPolicy, encoder=LowDim, network=partial(StagedNetwork, network=MLP, switch=0.5), steps=3),
    "heun": partial(FlowPolicy, encoder=LowDim, network=MLP, steps=3, solver="heun"),
    "ebt": partial(EnergyPolicy, encoder=LowDim, network=MLP, max_steps=3),
    "gaussian": partial(GaussianPolicy, encoder=LowDim, hidden=(16,), temperature=1.0),
}


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def fitted(make, spec=SPEC):
    """A policy in which no layer is left at 0, for observations and actions in [-2, 2]."""
    torch.manual_seed(0)
    policy = make(spec=spec)
    for parameter in policy.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    twos = {key: 2 * np.ones(width) for key, width in policy.normalizer.widths.items()}
    policy.fit_normalizer({k: KeyStatistics(min=-w, max=w, mean=0 * w, std=w, count=1) for k, w in twos.items()})
    return policy.eval()


def observed(batch, spec=SPEC, seed=0):
    generator = torch.Generator().manual_seed(seed)
    steps = spec.observation_steps
    return {key: torch.randn(batch, steps, *a.shape, generator=generator) for key, a in spec.observations.items()}


def seeded(seed):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_eager_engine_is_the_policy(family):
    policy = fitted(FAMILIES[family])
    act = compile_act(policy, batch=4, engine="eager")
    obs, same = observed(4), torch.testing.assert_close
    same(act(obs, generator=seeded(1)), policy.act(obs, generator=seeded(1)))
    rows = [seeded(seed) for seed in range(4)], [seeded(seed) for seed in range(4)]
    same(act(obs, generator=rows[0]), policy.act(obs, generator=rows[1]))
    noise = torch.randn(4, 6, 2, generator=seeded(2))
    same(act(obs, noise=noise, generator=seeded(3)), policy.act(obs, noise=noise, generator=seeded(3)))
    assert act(obs, generator=seeded(1)).shape == (4, 3, 2)


@pytest.mark.parametrize(("family", "sizes"), [("ddpm", [2]), ("flow_sde", [2]), ("staged", [1]), ("gaussian", [2, 1])])
def test_compiled_engines_are_the_policy_within_their_tolerance(family, sizes, quick_compiler):
    policy = fitted(FAMILIES[family])
    acts = {batch: compile_act(policy, batch=batch, engine="compiled") for batch in sizes}
    with torch.compiler.set_stance("fail_on_recompile"):
        for batch, act in acts.items():
            for seed in range(3):
                obs = observed(batch, seed=seed)
                torch.testing.assert_close(act(obs, generator=seeded(seed)), policy.act(obs, generator=seeded(seed)))
            with torch.inference_mode():
                assert act(observed(batch)).shape == (batch, 3, 2)
            assert act.chosen.name == "compiled"
            assert act.chosen.error < 1e-4


def test_a_long_chunk_is_compiled_step_by_step(monkeypatch, quick_compiler):
    programs, make = [], engine._program
    monkeypatch.setattr(engine, "LONGEST_PROGRAM", 5)
    monkeypatch.setattr(engine, "_program", lambda run, policy: programs.append(run.__name__) or make(run, policy))
    policy = fitted(FAMILIES["ddpm"])
    act = compile_act(policy, engine="compiled")
    assert programs == ["features", "_a_hat"]
    assert "features" not in vars(policy), "the policy itself stays as it is"
    with torch.compiler.set_stance("fail_on_recompile"):
        for seed in range(3):
            obs = observed(1, seed=seed)
            torch.testing.assert_close(act(obs, generator=seeded(seed)), policy.act(obs, generator=seeded(seed)))


UNET = partial(FlowPolicy, encoder=LowDim, network=partial(ConditionalUnet1d, widths=(8, 16)), steps=2)


@pytest.mark.parametrize(
    ("slow", "form", "layer"),
    [
        ([nn.Linear, nn.Conv1d], "packed", PackedLinear),
        ([PackedLinear, nn.Conv1d], "products", Windows),
        ([PackedLinear, Windows], "plain", nn.Conv1d),
    ],
)
def test_layers_are_written_in_the_form_that_is_fastest(monkeypatch, slow, form, layer):
    def slowed(forward):
        return lambda *args: (torch.linalg.svd(torch.eye(100)), forward(*args))[1]

    policy = fitted(UNET)
    for kind in slow:
        monkeypatch.setattr(kind, "forward", slowed(kind.forward))
    act = compile_act(policy, engine="eager")
    assert act.chosen.form == form
    frozen, _ = engine.FORMS[form](policy, torch.float32)
    assert layer in {type(module) for module in frozen.modules()}
    torch.testing.assert_close(act(observed(1), generator=seeded(0)), policy.act(observed(1), generator=seeded(0)))


def test_packed_weights_are_all_that_is_rounded(monkeypatch):
    monkeypatch.setattr(engine, "_best_start", lambda forms, data: ("packed", 1))
    policy = fitted(UNET)
    act = compile_act(policy, dtype="bfloat16", engine="eager")
    assert (act.chosen.form, act.chosen.dtype) == ("packed", "bfloat16")
    assert 1e-5 < act.chosen.error < 0.02
    frozen, dtype = engine.FORMS["packed"](policy, torch.bfloat16)
    assert dtype == torch.float32
    assert {module.panels.dtype for module in frozen.modules() if isinstance(module, PackedLinear)} == {torch.bfloat16}


@pytest.mark.parametrize("family", ["ebt", "gaussian"])
def test_only_what_denoises_has_packed_weights(family):
    act = compile_act(fitted(FAMILIES[family]), engine="eager")
    assert act.chosen.form in ("products", "plain")
    assert act.candidates[-1].form == "packed"
    assert act.candidates[-1].refused == "weights are packed for denoising on a CPU only"


def test_without_a_compiler_the_other_forms_are_left(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    few_rows.load_product.cache_clear()
    act = compile_act(fitted(FAMILIES["flow"]), engine="eager")
    assert act.chosen.form != "packed"
    assert act.candidates[-1].refused == (
        "there is no C++ compiler 'no-such-compiler': install g++, or name one in CXX"
    )


def test_the_fastest_of_what_was_measured_is_taken(monkeypatch):
    policy = fitted(FAMILIES["flow"])

    def slow(frozen, dtype):
        run = engine._eager(frozen, dtype)
        return lambda *args: (torch.linalg.svd(torch.eye(200)), run(*args))[1]

    monkeypatch.setattr(engine, "ENGINES", {"slow": slow, "eager": engine._eager})
    act = policy.compile_act(dtype="auto")
    assert act.chosen.name == "eager"
    assert [(c.name, c.dtype) for c in act.candidates] == [
        ("slow", "float32"),
        ("eager", "float32"),
        ("slow", "bfloat16"),
        ("eager", "bfloat16"),
    ]
    assert act.chosen.chunk_ms == min(c.chunk_ms for c in act.candidates)
    assert act.candidates[0].chunk_ms > act.candidates[1].chunk_ms


def test_from_images_and_in_bfloat16():
    camera = partial(Cameras, backbone=partial(SmallViT, embed_dim=8, heads=2, features=8))
    policy = fitted(partial(FlowPolicy, encoder=camera, network=MLP, steps=2), SEEN)
    obs = {"camera": torch.randint(0, 256, (2, 1, 20, 20, 3), dtype=torch.uint8)}
    act = compile_act(policy, batch=2, dtype="bfloat16", engine="eager")
    assert act.chosen.dtype == "bfloat16"
    exact = policy.act(obs, generator=seeded(0))
    rounded = act(obs, generator=seeded(0))
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, exact, rtol=0, atol=0.04)
    assert not rounded.equal(exact)


def test_the_number_of_steps_is_the_engines_own():
    policy = fitted(FAMILIES["flow"])
    act = compile_act(policy, steps=1, engine="eager")
    obs, noise = observed(1), torch.randn(1, 6, 2, generator=seeded(0))
    assert not act(obs, noise=noise).allclose(policy.act(obs, noise=noise), atol=1e-3)
    policy.set_steps(1)
    torch.testing.assert_close(act(obs, noise=noise), policy.act(obs, noise=noise))


def test_an_engine_keeps_the_weights_it_was_built_with():
    policy = fitted(FAMILIES["flow"])
    act = compile_act(policy, engine="eager")
    obs = observed(1)
    before = act(obs, generator=seeded(0))
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.zero_()
    assert act(obs, generator=seeded(0)).equal(before)


def test_what_cannot_be_built_says_why_and_is_left_out(monkeypatch):
    policy = fitted(FAMILIES["flow"])

    def broken(frozen, dtype):
        raise RuntimeError("no compiler\nis here")

    monkeypatch.setattr(engine, "ENGINES", {"eager": engine._eager, "compiled": broken})
    act = compile_act(policy)
    assert act.chosen.name == "eager"
    assert act.candidates[1].refused == "RuntimeError: no compiler"
    with pytest.raises(PolicyError, match=r"no engine can be built: compiled float32 \w+: RuntimeError: no compiler"):
        compile_act(policy, engine="compiled")


def test_what_is_not_exact_enough_is_left_out(monkeypatch):
    monkeypatch.setitem(engine.TOLERANCES, torch.bfloat16, 1e-9)
    policy = fitted(FAMILIES["flow"])
    with pytest.raises(PolicyError, match=r"its error of .* is above the tolerance of 1e-09"):
        compile_act(policy, dtype="bfloat16", engine="eager")
    assert compile_act(policy, dtype="auto", engine="eager").chosen.dtype == "float32"


def test_the_threads_of_others_stay_as_they_are(monkeypatch):
    seen, policy = [], fitted(FAMILIES["flow"])
    monkeypatch.setattr(engine, "_best_start", lambda forms, data: ("plain", 1))
    torch.set_num_threads(2)
    act = compile_act(policy, engine="eager")
    act._run = lambda *args: seen.append(torch.get_num_threads())
    act(observed(1))
    assert act.chosen.threads == 1
    assert seen == [1]
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("flow", {"batch": 0}, "batch must be at least 1, got 0"),
        ("flow", {"steps": 0}, "a grid needs steps >= 1 and 0 < start <= 1, got steps=0"),
        ("gaussian", {"steps": 3}, "steps=3: a GaussianPolicy does not denoise, leave steps out"),
        ("flow", {"dtype": "float16"}, "dtype 'float16' is unknown; nearest: bfloat16"),
        ("flow", {"engine": "compile"}, "engine 'compile' is unknown; nearest: compiled"),
    ],
)
def test_options_out_of_range_are_refused(family, options, message):
    with pytest.raises(PolicyError) as error:
        compile_act(fitted(FAMILIES[family]), **options)
    assert str(error.value).startswith(message)


def test_observations_that_do_not_fit_are_refused():
    act = compile_act(fitted(FAMILIES["flow"]), batch=2, engine="eager")
    with pytest.raises(PolicyError) as error:
        act(observed(3))
    assert str(error.value) == (
        "this engine was built for batches of 2, observation 'state' has 3: build another with compile_act"
    )
    obs = observed(2)
    del obs["finger"]
    with pytest.raises(PolicyError, match="observation 'finger' is missing"):
        act(obs)
