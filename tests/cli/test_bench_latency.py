from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from flowsteer.cli.bench_latency import LOOPS, SPEC, LatencyBenchmark, _observation, engines, make_policy, step_floor_ms
from flowsteer.cli.main import main
from flowsteer.configs.groups import DENOISERS
from flowsteer.policies.consistency import ConsistencyPolicy

EAGER = OmegaConf.structured(LatencyBenchmark(engines=["eager"]))


@pytest.mark.parametrize(
    ("family", "network", "steps"),
    # What differs between networks is the same for both families.
    [*((family, "mlp", 1) for family in LOOPS), ("diffusion", "mlp", 2), *(("flow", name, 2) for name in DENOISERS)],
)
@torch.inference_mode()
def test_both_contenders_make_the_same_chunk(family: str, network: str, steps: int) -> None:
    policy = make_policy(family, network, steps)
    noise = torch.randn(1, SPEC.prediction_steps, SPEC.action_dim, generator=torch.Generator().manual_seed(0))
    (act,) = engines(policy, EAGER).values()
    chunk = act(_observation(policy), noise=noise)
    noise_there = noise[:, SPEC.executed]
    assert (chunk - noise_there).abs().max() > 0.1
    torch.testing.assert_close(chunk, LOOPS[family][1](policy, steps)(noise), atol=2e-4, rtol=1e-3)


def test_a_row_for_every_combination(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["policies=[flow]", "networks=[mlp]", "steps=[1,2]", "engines=[eager]", "dtypes=[bfloat16]", "repeats=3"]
    options += ["+network_options.hidden=32", "+network_options.blocks=1"]
    assert main(["bench", "latency", *options, "device=cpu", f"out={tmp_path}"]) == 0
    written = json.loads((tmp_path / "latency.json").read_text())
    rows = written["rows"]
    small = make_policy("flow", "mlp", 1, {"hidden": 32, "blocks": 1}).network
    assert written["weights"] == {"mlp": sum(parameter.numel() for parameter in small.parameters())}
    assert len(small.blocks) == 1
    contenders = ["diffusers", "eager bfloat16"]
    assert [(row["steps"], row["contender"]) for row in rows] == [(k, name) for k in (1, 2) for name in contenders]
    for loop, engine in (rows[:2], rows[2:]):
        assert 0 < engine["p50_ms"] <= engine["p95_ms"] <= engine["p99_ms"]
        assert loop["x_loop"] == 1
        assert engine["form"] in ("packed", "products", "plain")
        assert (loop["dtype"], engine["dtype"]) == ("float32", "bfloat16")
        assert engine["x_loop"] == pytest.approx(loop["p50_ms"] / engine["p50_ms"])
        assert engine["of_floor"] == pytest.approx(engine["floor_ms"] / engine["p50_ms"])
    table = capsys.readouterr().out
    assert all(column in table for column in ("p50 ms", "x loop", "of floor"))


def test_of_students_there_is_no_scheduler(tmp_path: Path) -> None:
    options = ["policies=[consistency]", "networks=[mlp]", "steps=[1]", "engines=[eager]", "repeats=3"]
    options += ["+network_options.hidden=32", "+network_options.blocks=1"]
    assert main(["bench", "latency", *options, "device=cpu", f"out={tmp_path}"]) == 0
    rows = json.loads((tmp_path / "latency.json").read_text())["rows"]
    assert [row["contender"] for row in rows] == ["policy.act", "eager"]
    assert rows[0]["x_loop"] == 1
    assert type(make_policy("consistency", "mlp", 1)) is ConsistencyPolicy


def test_the_floor_counts_the_products_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    # Nothing takes time but the products, at 1 GFLOP/s.
    monkeypatch.setattr("flowsteer.cli.bench_latency.fastest_s", lambda call, device, repeats: 0.0)
    policy = make_policy("flow", "mlp", 2)
    chunk, hidden = SPEC.prediction_steps * SPEC.action_dim, 256
    products = 2 * chunk * hidden + 4 * 2 * hidden * 2 * hidden
    assert step_floor_ms(policy, gflops=1.0, size=4) == pytest.approx(2 * products * 1e-6)


def test_the_floor_counts_the_weights_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    # Every weight takes a second; those of time and observation alone are not read at every step.
    monkeypatch.setattr("flowsteer.cli.bench_latency.fastest_s", lambda call, device, repeats: len(call.__self__))
    policy = make_policy("flow", "mlp", 2)
    parts = (policy.network.chunk_input, policy.network.blocks, policy.network.norm, policy.network.output)
    weights = sum(parameter.numel() for part in parts for parameter in part.parameters())
    assert step_floor_ms(policy, gflops=1e9, size=4) == pytest.approx(1e3 * weights)
    assert step_floor_ms(policy, gflops=1e9, size=2) == pytest.approx(1e3 * weights / 2, abs=1e3)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("policies=[gaussian]", "policy 'gaussian' is unknown; nearest: "),
        ("networks=[mpl]", "network 'mpl' is unknown; nearest: mlp"),
        ("+network_options.hiden=512", "option of mlp 'hiden' is unknown; nearest: hidden"),
        ("networks=[]", "networks is empty: give at least one"),
        ("steps=[]", "steps is empty: give at least one"),
        ("steps=[1,0]", "steps must be positive, got 0"),
        ("repeats=0", "repeats must be positive, got 0"),
        ("engines=[]", "engines is empty: give at least one"),
        ("engines=[eagre]", "engine 'eagre' is unknown; nearest: eager"),
    ],
)
def test_what_cannot_be_measured_is_refused(option: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "latency", option]) != 0
    assert message in capsys.readouterr().err
