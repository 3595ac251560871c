import copy
from dataclasses import replace
from functools import partial
from itertools import product

import numpy as np
import pytest
import torch
from torch import nn

from flowsteer.datasets.key_statistics import KeyStatistics
from flowsteer.policies import engine, few_rows
from flowsteer.policies.consistency import ConsistencyPolicy
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
from flowsteer.policies.paths import LinearPath
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
    "consistency": partial(
        ConsistencyPolicy, encoder=LowDim, network=MLP, path=LinearPath(), prediction="velocity", min_time=1e-3, steps=2
    ),
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


@pytest.mark.parametrize(
    ("family", "sizes", "form"),
    [
        ("ddpm", [2], "packed"),
        ("flow_sde", [2], "plain"),
        ("staged", [1], "packed"),
        ("consistency", [1], "packed"),
        ("gaussian", [2, 1], "plain"),
    ],
)
def test_compiled_engines_are_the_policy_within_their_tolerance(family, sizes, form, quick_compiler, monkeypatch):
    monkeypatch.setattr(engine, "FORMS", {form: engine.FORMS[form]})
    policy = fitted(FAMILIES[family])
    acts = {batch: compile_act(policy, batch=batch, engine="compiled") for batch in sizes}
    with torch.compiler.set_stance("fail_on_recompile"):
        for batch, act in acts.items():
            for seed in range(3):
                obs = observed(batch, seed=seed)
                torch.testing.assert_close(act(obs, generator=seeded(seed)), policy.act(obs, generator=seeded(seed)))
            assert (act.chosen.name, act.chosen.form) == ("compiled", form)
            assert act.chosen.error < 1e-4


def test_what_is_given_may_come_in_any_layout_dtype_and_mode(quick_compiler):
    policy = fitted(FAMILIES["flow"])
    with torch.inference_mode():
        act = compile_act(policy, engine="compiled")
    obs, noise = observed(1), torch.randn(1, 6, 2, generator=seeded(0))
    expected = policy.act(obs, noise=noise)
    ways = [
        lambda x: x.double(),
        lambda x: x.clone().requires_grad_(),
        lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
        lambda x: x[0].expand(1, *x.shape[1:]),
    ]
    with torch.compiler.set_stance("fail_on_recompile"):
        for way in ways:
            actions = act({key: way(value) for key, value in obs.items()}, noise=way(noise))
            torch.testing.assert_close(actions, expected)
            assert not actions.requires_grad
        with torch.inference_mode():
            torch.testing.assert_close(act(observed(1), noise=noise.clone()), expected)


def test_a_long_chunk_is_compiled_step_by_step(monkeypatch, quick_compiler):
    programs, make = [], engine._program
    monkeypatch.setattr(engine, "FORMS", {"packed": engine.FORMS["packed"]})
    monkeypatch.setattr(engine, "LONGEST_PROGRAM", 5)
    monkeypatch.setattr(engine, "_program", lambda run, policy: programs.append(run.__name__) or make(run, policy))
    policy = fitted(FAMILIES["staged"])
    act = compile_act(policy, engine="compiled")
    assert programs == ["features", "_settled_a_hat"]
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

    policy, calls, forward = fitted(UNET), [], layer.forward
    for kind in slow:
        monkeypatch.setattr(kind, "forward", slowed(kind.forward))
    act = compile_act(policy, engine="eager")
    assert act.chosen.form == form
    assert {(c.form, c.refused) for c in act.candidates} == {("packed", None), ("products", None), ("plain", None)}
    monkeypatch.setattr(layer, "forward", lambda *args: calls.append(args) or forward(*args))
    actions = act(observed(1), generator=seeded(0))
    assert len(calls) > 10
    torch.testing.assert_close(actions, policy.act(observed(1), generator=seeded(0)))


def test_packed_weights_are_all_that_is_rounded(monkeypatch):
    monkeypatch.setattr(engine, "FORMS", {"packed": engine.FORMS["packed"]})
    policy = fitted(UNET)
    act = compile_act(policy, dtype="bfloat16", engine="eager")
    assert act.chosen.dtype == "bfloat16"
    assert 1e-5 < act.chosen.error < 0.02
    frozen, dtype = engine.FORMS["packed"](policy, torch.bfloat16)
    assert dtype == torch.float32
    assert {module.panels.dtype for module in frozen.modules() if isinstance(module, PackedLinear)} == {torch.bfloat16}


def test_only_what_denoises_has_packed_weights():
    act = compile_act(fitted(FAMILIES["gaussian"]), engine="eager")
    assert act.candidates[0].form == "packed"
    refused = {candidate.form: candidate.refused for candidate in act.candidates}
    assert refused == {
        "packed": "GaussianPolicy does not denoise",
        "products": "no layer is a short convolution, so this is the plain form",
        "plain": None,
    }


def test_a_form_that_errs_or_fails_leaves_the_others(monkeypatch):
    def wrong(policy, dtype):
        changed = copy.deepcopy(policy)
        changed.network.output.bias += 1
        return changed, dtype

    def broken(policy, dtype):
        raise OSError("no room")

    monkeypatch.setattr(engine, "FORMS", {"wrong": wrong, "broken": broken, **engine.FORMS})
    policy = fitted(FAMILIES["flow"])
    act = compile_act(policy, engine="eager")
    reasons = {candidate.form: candidate.refused for candidate in act.candidates}
    assert reasons["wrong"].endswith("is above the tolerance of 0.0001")
    assert reasons["broken"] == "OSError: no room"
    torch.testing.assert_close(act(observed(1), generator=seeded(0)), policy.act(observed(1), generator=seeded(0)))


def test_a_form_that_does_not_compile_is_compiled_in_another(monkeypatch):
    def compiled(policy, dtype):
        if any(isinstance(module, PackedLinear) for module in policy.modules()):
            raise RuntimeError("not this one")
        return engine._eager(policy, dtype)

    monkeypatch.setattr(engine, "_compiled", compiled)
    monkeypatch.setattr(
        engine, "_best_first", lambda measured: [c for c in measured if c.threads == 1 and not c.refused]
    )
    act = compile_act(fitted(FAMILIES["flow"]), engine="compiled")
    assert act.chosen.form == "plain"
    assert [(c.form, c.refused) for c in act.candidates if c.name == "compiled"] == [
        ("packed", "RuntimeError: not this one"),
        ("plain", None),
    ]


def test_alike_forms_are_compiled_in_their_order_and_each_once():
    def measured(form, threads, chunk_ms):
        return engine.Candidate("eager", "float32", form, threads, chunk_ms)

    slow, alike, also, fast = (
        measured("packed", 2, 9.0),
        measured("packed", 1, 1.09),
        measured("products", 1, 1.2),
        measured("plain", 1, 1.0),
    )
    refused = engine.Candidate("eager", "float32", "other", 1, refused="why")
    assert engine._best_first([slow, alike, also, fast, refused]) == [alike, fast, also]
    assert engine._best_first([refused]) == []


def test_without_a_compiler_the_other_forms_are_left(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(few_rows, "LOADED", set())
    act = compile_act(fitted(FAMILIES["flow"]), engine="eager")
    assert act.chosen.form != "packed"
    assert act.candidates[0].refused == "there is no C++ compiler 'no-such-compiler': install g++, or name one in CXX"


def test_the_fastest_of_what_was_measured_is_taken(monkeypatch):
    def slow(policy, dtype):
        run = engine._eager(policy, dtype)
        return lambda *args: (torch.linalg.svd(torch.eye(200)), run(*args))[1]

    monkeypatch.setattr(engine, "_compiled", slow)
    act = fitted(FAMILIES["flow"]).compile_act(dtype="auto")
    assert act.chosen.name == "eager"
    assert {(c.name, c.dtype) for c in act.candidates} == set(product(("eager", "compiled"), ("float32", "bfloat16")))
    assert act.chosen.chunk_ms == min(c.chunk_ms for c in act.candidates if not c.refused)


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

    monkeypatch.setattr(engine, "_compiled", broken)
    act = compile_act(policy)
    assert act.chosen.name == "eager"
    assert act.candidates[-1].refused == "RuntimeError: no compiler"
    with pytest.raises(PolicyError, match=r"no engine can be built: compiled float32 \w+: RuntimeError: no compiler"):
        compile_act(policy, engine="compiled")


def test_what_is_not_exact_enough_is_left_out(monkeypatch):
    monkeypatch.setitem(engine.TOLERANCES, torch.bfloat16, 1e-9)
    policy = fitted(FAMILIES["flow"])
    with pytest.raises(PolicyError, match=r"its error of .* is above the tolerance of 1e-09"):
        compile_act(policy, dtype="bfloat16", engine="eager")
    assert compile_act(policy, dtype="auto", engine="eager").chosen.dtype == "float32"


def test_an_engine_has_its_own_number_of_threads():
    torch.set_num_threads(2)
    act, seen = compile_act(fitted(FAMILIES["flow"]), engine="eager"), []
    assert {candidate.threads for candidate in act.candidates} == {1, 2}
    act.chosen = replace(act.chosen, threads=1)
    act._run = lambda *args: seen.append(torch.get_num_threads())
    act(observed(1))
    assert seen == [1]
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("flow", {"batch": 0}, "batch must be at least 1, got 0"),
        ("flow", {"steps": 0}, "steps must be at least 1 and start in (0, 1], got steps=0"),
        ("gaussian", {"steps": 3}, "steps=3: GaussianPolicy does not denoise, leave steps out"),
        ("flow", {"dtype": "float16"}, "dtype 'float16' is unknown; nearest: bfloat16"),
        ("flow", {"dtype": torch.bfloat16}, "dtype 'torch.bfloat16' is unknown; nearest: bfloat16"),
        ("flow", {"engine": "compile"}, "engine 'compile' is unknown; nearest: compiled"),
    ],
)
def test_options_out_of_range_are_refused(family, options, message):
    with pytest.raises(PolicyError) as error:
        compile_act(fitted(FAMILIES[family]), **options)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize("name", ["eager", "compiled"])
def test_inputs_that_do_not_fit_are_refused(name, monkeypatch, quick_compiler):
    monkeypatch.setattr(engine, "FORMS", {"plain": engine.FORMS["plain"]})
    act = compile_act(fitted(FAMILIES["flow"]), batch=2, engine=name)
    for obs, noise, message in [
        (observed(3), None, "this engine was built for batches of 2, observation 'state' has 3: build another with"),
        ({"state": observed(2)["state"]}, None, "observation 'finger' is missing; got ['state']"),
        ({**observed(2), "finger": np.zeros((2, 2, 2))}, None, "observation 'finger' must be a tensor, got ndarray: "),
        ({**observed(2), "finger": torch.zeros(2, 2, 3)}, None, "observation 'finger' must have shape [B, 2, 2], got"),
        (observed(2), torch.zeros(2, 5, 2), "noise must have shape [2, 6, 2], got [2, 5, 2]"),
    ]:
        with pytest.raises(PolicyError) as error:
            act(obs, noise=noise)
        assert str(error.value).startswith(message)
