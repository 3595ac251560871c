"""Checkpoints: what goes in comes out, whatever goes wrong leaves the last good one."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from flowsteer.policies import checkpoint
from flowsteer.policies.checkpoint import (
    TrainerState,
    link,
    load_policy,
    prune,
    read_config,
    resolve,
    save_checkpoint,
    write_config,
)
from flowsteer.policies.errors import PolicyError
from flowsteer.policies.policy import Policy

Make = Callable[..., Policy]
Describe = Callable[[str], dict[str, Any]]


def save(folder: Path, policy: Policy, config: dict[str, Any]) -> Path:
    save_checkpoint(folder, policy, policy, config, TrainerState({"step": 3}, {"x": torch.ones(2)}))
    return folder


def test_what_is_loaded_acts_as_what_was_saved(
    tmp_path: Path, family: str, make_policy: Make, describe: Describe
) -> None:
    policy = make_policy(family).eval()
    save(tmp_path / "c", policy, describe(family))
    obs = {"state": torch.randn(5, 2, 3)}
    generators = [torch.Generator().manual_seed(1) for _ in range(2)]
    loaded = load_policy(tmp_path / "c")
    assert torch.equal(loaded.act(obs, generator=generators[0]), policy.act(obs, generator=generators[1]))
    assert loaded.spec == policy.spec
    assert not loaded.training


def test_weights_and_their_average_are_kept_apart(tmp_path: Path, make_policy: Make, describe: Describe) -> None:
    save_checkpoint(tmp_path / "c", make_policy("flow", 0), make_policy("flow", 1), describe("flow"))
    stored = {name: dict(load_policy(tmp_path / "c", weights=name).named_parameters()) for name in ("weights", "ema")}
    for name, policy in (("weights", make_policy("flow", 0)), ("ema", make_policy("flow", 1))):
        assert all(torch.equal(stored[name][k], v) for k, v in policy.named_parameters())


def test_whoever_reads_the_config_may_read_the_weights(tmp_path: Path, make_policy: Make, describe: Describe) -> None:
    folder = save(tmp_path / "c", make_policy("flow"), describe("flow"))
    assert len({file.stat().st_mode for file in folder.iterdir()}) == 1


def test_a_run_folder_means_its_last_checkpoint(tmp_path: Path, make_policy: Make, describe: Describe) -> None:
    for step in ("1", "2", "3"):
        save(tmp_path / "checkpoints" / step, make_policy("flow"), describe("flow"))
    link(tmp_path, "best", tmp_path / "checkpoints" / "1")
    for step in ("2", "3"):
        link(tmp_path, "last", tmp_path / "checkpoints" / step)
    assert resolve(tmp_path).name == "3"
    assert resolve(tmp_path / "best").name == "1"
    prune(tmp_path)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["1", "3"]
    assert not os.path.isabs(os.readlink(tmp_path / "last")), "a run folder can be moved"


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match=r"holds no checkpoint yet: name a run folder, RUN/best or RUN/checkpoints"):
        resolve(tmp_path)
    with pytest.raises(PolicyError, match=r"nowhere does not exist"):
        resolve(tmp_path / "nowhere")


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_truncated_weights(tmp_path: Path, keep: int, make_policy: Make, describe: Describe) -> None:
    file = save(tmp_path / "c", make_policy("flow"), describe("flow")) / "policy.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(PolicyError, match=r"policy.safetensors is damaged or not a safetensors file"):
        load_policy(tmp_path / "c")


def test_weights_of_another_policy(tmp_path: Path, make_policy: Make, describe: Describe) -> None:
    save(tmp_path / "c", make_policy("gaussian"), describe("flow"))
    with pytest.raises(PolicyError, match=r"policy.safetensors does not fit the policy's options \(Unexpected key"):
        load_policy(tmp_path / "c")


def test_weights_of_another_width_are_told_by_name(tmp_path: Path, make_policy: Make, describe: Describe) -> None:
    wide = {**describe("flow"), "policy": {**describe("flow")["policy"]}}
    wide["policy"]["network"] = {**wide["policy"]["network"], "hidden": 24}
    save(tmp_path / "c", make_policy("flow"), wide)
    message = r"options \(size mismatch for network\..*\): set the options that it was trained with, or take another"
    with pytest.raises(PolicyError, match=message):
        load_policy(tmp_path / "c")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1, 2]", "is not a checkpoint of format 1"),
        ("format: 7", "is not a checkpoint of format 1"),
        ("format: 1", "config.yaml is damaged: it lacks 'policy': take another checkpoint"),
        ("{format: 1, policy: {_target_: x}}", "config.yaml is damaged: it lacks 'spec': take another checkpoint"),
        ("{format: 1, policy: 3, spec: {}}", "config.yaml is damaged: it lacks 'policy': take another checkpoint"),
        ("{format: 1, policy: {}, spec: {action_dim: 2}}", "is damaged: its spec .*'observations'"),
        ("{format: 1, policy: {}, spec: {observations: [1]}}", "is damaged: its spec"),
        ("a: [", "is not readable"),
        ("!!python/object/apply:os.system ['echo no']", "is not readable"),
    ],
)
def test_foreign_config(tmp_path: Path, text: str, message: str, make_policy: Make, describe: Describe) -> None:
    save(tmp_path / "c", make_policy("flow"), describe("flow"))
    (tmp_path / "c" / "config.yaml").write_text(text)
    with pytest.raises(PolicyError, match=message):
        load_policy(tmp_path / "c")


def test_a_config_cut_off_anywhere_names_its_file(tmp_path: Path, make_policy: Make, describe: Describe) -> None:
    file = save(tmp_path / "c", make_policy("flow"), describe("flow")) / "config.yaml"
    text = file.read_text()
    assert checkpoint.read_config(tmp_path / "c")["spec"] == describe("flow")["spec"]
    # Whatever ends before the last value; what ends within it is a number as good as any.
    for end in range(text.rindex(":") + 2):
        file.write_text(text[:end])
        with pytest.raises(PolicyError, match=str(file)):
            checkpoint.read_config(tmp_path / "c")


def test_a_config_cannot_call_what_is_not_ours(tmp_path: Path, make_policy: Make, describe: Describe) -> None:
    folder = save(tmp_path / "c", make_policy("flow"), describe("flow"))
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["policy"] = {"_target_": "os.system", "command": f"touch {tmp_path}/owned"}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(PolicyError):
        load_policy(folder)
    assert not (tmp_path / "owned").exists()


def test_a_full_disk_leaves_nothing(
    tmp_path: Path, make_policy: Make, describe: Describe, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "_sync", full)
    with pytest.raises(OSError, match=r"No space left"):
        save(tmp_path / "c", make_policy("flow"), describe("flow"))
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_without_training_state_says_so(tmp_path: Path, make_policy: Make, describe: Describe) -> None:
    save_checkpoint(tmp_path / "c", make_policy("flow"), make_policy("flow"), describe("flow"))
    with pytest.raises(PolicyError, match=r"trainer.json: this checkpoint cannot be resumed"):
        checkpoint.load_trainer(tmp_path / "c")


def _write_for_ever(run: Path, policy: Policy, config: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    for step in range(1, 100000):
        folder = run / "checkpoints" / f"{step:08d}"
        save_checkpoint(folder, policy, policy, config, TrainerState({"step": step}, {"step": torch.tensor(step)}))
        link(run, "last", folder)
        prune(run)


def test_a_kill_at_any_moment_leaves_a_whole_checkpoint(tmp_path: Path, make_policy: Make, describe: Describe) -> None:
    policy, dice = make_policy("flow"), random.Random(0)
    context = multiprocessing.get_context("fork")
    for attempt in range(8):
        run = tmp_path / str(attempt)
        writer = context.Process(target=_write_for_ever, args=(run, policy, describe("flow")))
        writer.start()
        deadline = time.monotonic() + 30
        while not (run / "last").exists() and time.monotonic() < deadline:
            time.sleep(0.002)
        time.sleep(dice.uniform(0, 0.05))
        assert writer.pid is not None
        os.kill(writer.pid, signal.SIGKILL)
        writer.join()
        load_policy(run)
        state = checkpoint.load_trainer(resolve(run))
        assert state.tensors["step"].item() == state.values["step"] == int(resolve(run).name)
        prune(run)
        assert len(list((run / "checkpoints").iterdir())) == 1, "what the kill left behind is cleared away"


def test_trainer_values_are_plain_json(tmp_path: Path, make_policy: Make, describe: Describe) -> None:
    folder = save(tmp_path / "c", make_policy("flow"), describe("flow"))
    assert json.loads((folder / "trainer.json").read_text()) == {"step": 3}


def test_a_config_is_replaced_whole_or_not_at_all(
    tmp_path: Path, make_policy: Make, describe: Describe, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save(tmp_path / "c", make_policy("flow"), describe("flow"))
    before, files = read_config(folder), sorted(path.name for path in folder.iterdir())
    write_config(folder, {**before, "rti": {8: {"start": 0.5}}})
    assert read_config(folder) == {**before, "rti": {8: {"start": 0.5}}}

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        write_config(folder, before)
    assert read_config(folder)["rti"] == {8: {"start": 0.5}}
    assert sorted(path.name for path in folder.iterdir()) == files
