import json

import pytest
import torch
from omegaconf import OmegaConf

from flowsteer.cli import bench_update
from flowsteer.cli.main import main

SMALL = {
    "num_envs": 4,
    "decisions": 5,
    "steps": 6,
    "fine_tuned_steps": 3,
    "epochs": 2,
    "batch_size": 20,
    "hidden": 16,
    "blocks": 1,
}


@pytest.fixture
def loop():
    pytest.importorskip("mujoco")
    config = OmegaConf.structured(bench_update.UpdateBenchmark(**SMALL, device="cpu"))
    made = bench_update._loop(config, torch.device("cpu"))
    yield made
    made.env.close()


def test_the_result_has_all_contenders(quick_compiler, tmp_path, capsys):
    pytest.importorskip("mujoco")
    options = [f"{name}={value}" for name, value in SMALL.items()] + ["compile=true"]
    assert main(["bench", "update", *options, "device=cpu", f"out={tmp_path}"]) == 0
    told = json.loads((tmp_path / "update.json").read_text())
    ours, compiled, theirs = told["rows"]
    assert [row["contender"] for row in told["rows"]] == [
        "flowsteer",
        "flowsteer, train.compile=true",
        "straightforward",
    ]
    assert compiled["speedup"] == pytest.approx(theirs["update_s"] / compiled["update_s"])
    assert ours["speedup"] == pytest.approx(theirs["update_s"] / ours["update_s"])
    assert told["compile_s"] > 0
    assert 0 < told["env_steps"] <= 4 * 5 * 4


def test_the_straightforward_one_computes_the_same(loop):
    # Else the comparison would be of two different updates.
    straightforward = bench_update.Straightforward(loop)
    loop.generator.manual_seed(0)
    sample = loop.update.sample(loop.collect())[0]
    batch = torch.arange(0, 60, 7)
    expected = sample.memory["log_prob"][batch // 3, batch % 3]
    with torch.no_grad():
        torch.testing.assert_close(straightforward._log_prob(sample, batch), expected, atol=1e-4, rtol=1e-4)


def test_a_size_of_nothing_is_refused(capsys):
    assert main(["bench", "update", "decisions=0"]) == 2
    assert "decisions must be positive, got 0" in capsys.readouterr().err
