from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from flowsteer.cli.bench_latency import LOOPS, SPEC, make_policy, ours
from flowsteer.cli.main import main
from flowsteer.configs.groups import NETWORKS


@pytest.mark.parametrize("network", list(NETWORKS))
@pytest.mark.parametrize("family", list(LOOPS))
@pytest.mark.parametrize("steps", [1, 5])
@torch.inference_mode()
def test_both_contenders_make_the_same_chunk(family: str, network: str, steps: int) -> None:
    policy = make_policy(family, network, steps)
    noise = torch.randn(1, SPEC.prediction_steps, SPEC.action_dim, generator=torch.Generator().manual_seed(0))
    chunk = ours(policy)(noise)
    assert (chunk - noise).abs().max() > 0.1
    torch.testing.assert_close(chunk, LOOPS[family](policy, steps)(noise), atol=2e-4, rtol=1e-3)


def test_a_row_for_every_combination(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["policies=[flow]", "networks=[mlp]", "steps=[1,2]", "repeats=3", "device=cpu"]
    assert main(["bench", "latency", *options, f"out={tmp_path}"]) == 0
    rows = json.loads((tmp_path / "latency.json").read_text())["rows"]
    assert [(row["policy"], row["network"], row["steps"]) for row in rows] == [("flow", "mlp", 1), ("flow", "mlp", 2)]
    for row in rows:
        assert 0 < row["p50_ms"] <= row["p95_ms"] <= row["p99_ms"]
        assert row["ratio"] == pytest.approx(row["diffusers_p50_ms"] / row["p50_ms"])
    assert "p50_ms" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("policies=[gaussian]", "policy 'gaussian' is unknown; nearest: "),
        ("networks=[mpl]", "network 'mpl' is unknown; nearest: mlp"),
        ("networks=[]", "networks is empty: give at least one"),
        ("steps=[]", "steps is empty: give at least one"),
        ("steps=[1,0]", "steps must be positive, got 0"),
        ("repeats=0", "repeats must be positive, got 0"),
    ],
)
def test_what_cannot_be_measured_is_refused(option: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "latency", option]) != 0
    assert message in capsys.readouterr().err
