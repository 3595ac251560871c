"""Checkpoints: a folder of YAML, JSON and safetensors, written whole or not at all. Nothing is ever unpickled.

    config.yaml          what rebuilds the policy, and what it was trained on
    policy.safetensors   weights ("weights."), averaged weights ("ema."), the normaliser within both
    trainer.safetensors  tensors of the training state: optimiser, random number generators
    trainer.json         the rest of it: step, counters, the position in the data

A run folder holds `checkpoints/STEP` and two links, `last` and `best`.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from flowsteer.policies.build import build
from flowsteer.policies.errors import PolicyError
from flowsteer.policies.policy import Policy
from flowsteer.policies.spec import PolicySpec

FORMAT = 1
CONFIG, POLICY, TRAINER, TRAINER_JSON = "config.yaml", "policy.safetensors", "trainer.safetensors", "trainer.json"


@final
@dataclass(frozen=True)
class TrainerState:
    """What a trainer needs besides the weights to go on bit for bit: plain JSON values and tensors by name."""

    values: dict[str, Any]
    tensors: dict[str, Tensor]


def save_checkpoint(
    folder: Path, weights: Policy, ema: Policy, config: Mapping[str, Any], trainer: TrainerState | None = None
) -> None:
    """Write `folder` atomically: a kill at any moment leaves it absent or complete.

    Args:
        folder: must not exist yet.
        weights: the trained weights.
        ema: the averaged weights.
        config: plain values; "policy" (with `_target_`) and "spec" rebuild the policy, other keys go along.
        trainer: left out for a checkpoint that is only run.

    Raises:
        PolicyError, OSError: the disk is full or not writable.
    """
    temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}")
    temporary.mkdir(parents=True)
    try:
        save_file(_prefixed("weights.", weights) | _prefixed("ema.", ema), temporary / POLICY)
        (temporary / CONFIG).write_text(yaml.safe_dump({"format": FORMAT, **config}, sort_keys=False))
        if trainer is not None:
            save_file({k: v.contiguous() for k, v in trainer.tensors.items()}, temporary / TRAINER)
            (temporary / TRAINER_JSON).write_text(json.dumps(trainer.values, indent=1))
        for file in (POLICY, TRAINER):
            # Safetensors lets only its owner read what it writes; a policy is as public as its config.
            if (temporary / file).exists():
                shutil.copymode(temporary / CONFIG, temporary / file)
        _sync(*temporary.iterdir(), temporary)
        temporary.rename(folder)
    except SafetensorError as error:
        # Safetensors' name for whatever the file system refuses.
        raise PolicyError(f"{folder} cannot be written ({_first_line(error)}): free disk space") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def keep(run: Path, step_folder: Path, best: bool) -> None:
    """Make a checkpoint the run's last one, and the best if it is; drop those that no link names any more."""
    # In this order: a kill in between goes back to the older state, which will find its best again.
    for name in ("best", "last") if best else ("last",):
        link(run, name, step_folder)
    prune(run)


def link(run: Path, name: str, step_folder: Path) -> None:
    """Point `run/name` at a checkpoint below `run`, atomically."""
    temporary = run / f".{name}.{uuid.uuid4().hex[:8]}"
    temporary.symlink_to(step_folder.relative_to(run))
    os.replace(temporary, run / name)


def prune(run: Path) -> None:
    """Delete the checkpoints that no link names, and what a kill left behind."""
    kept = {(run / name).resolve() for name in ("last", "best") if (run / name).exists()}
    for folder in (run / "checkpoints").iterdir():
        if folder.resolve() not in kept:
            shutil.rmtree(folder)


def resolve(path: Path) -> Path:
    """The checkpoint folder that `path` means: itself, or the last one of a run folder.

    Raises:
        PolicyError: there is none.
    """
    for folder in (path, path / "last"):
        if (folder / POLICY).is_file():
            return folder.resolve()
    reason = "holds no checkpoint yet" if path.is_dir() else "does not exist"
    raise PolicyError(f"checkpoint {path} {reason}: name a run folder, RUN/best or RUN/checkpoints/STEP")


def read_config(path: Path) -> dict[str, Any]:
    """The configuration of a checkpoint or run folder.

    Raises:
        PolicyError: missing, unreadable, cut off, or of another format.
    """
    file = resolve(path) / CONFIG
    try:
        config = yaml.safe_load(file.read_text())
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise PolicyError(f"{file} is not readable: {_first_line(error)}") from error
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise PolicyError(f"{file} is not a checkpoint of format {FORMAT}: it was written by another version")
    _check_complete(config, file)
    return config


def write_config(path: Path, config: Mapping[str, Any]) -> None:
    """Replace the configuration of a checkpoint or run folder; a kill at any moment leaves the old one or the new."""
    file = resolve(path) / CONFIG
    temporary = file.with_name(f".{CONFIG}.{uuid.uuid4().hex[:8]}")
    try:
        temporary.write_text(yaml.safe_dump(dict(config), sort_keys=False))
        _sync(temporary)
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)


def _check_complete(config: Mapping[str, Any], file: Path) -> None:
    """Refuse what an interrupted copy leaves: YAML that has been cut off is often YAML still."""
    for key in ("policy", "spec"):
        if not isinstance(config.get(key), dict):
            raise PolicyError(f"{file} is damaged: it lacks '{key}': take another checkpoint")
    try:
        PolicySpec.from_dict(config["spec"])
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        reason = _first_line(error)
        raise PolicyError(f"{file} is damaged: its spec is not whole ({reason}): take another checkpoint") from error


def build_policy(config: Mapping[str, Any]) -> Policy:
    """An untrained policy from the "policy" and "spec" of a configuration."""
    policy = build(config["policy"], spec=PolicySpec.from_dict(config["spec"]))
    if not isinstance(policy, Policy):
        raise PolicyError(f"the configuration builds {type(policy).__name__}, not a policy")
    return policy


def load_policy(path: Path | str, device: torch.device | str = "cpu", weights: str = "ema") -> Policy:
    """The policy of a checkpoint or run folder, in evaluation mode.

    Args:
        path: a checkpoint, a run folder (its last), or RUN/best.
        device: where to put it.
        weights: "ema" or "weights".

    Raises:
        PolicyError: naming the file and what is wrong with it.
    """
    folder = resolve(Path(path))
    policy = build_policy(read_config(folder))
    load_weights(policy, folder, weights)
    return policy.to(device).eval()


def load_weights(policy: Policy, folder: Path, prefix: str) -> None:
    """Fill `policy` from the "ema" or "weights" part of a checkpoint folder."""
    stored = read_tensors(folder / POLICY)
    state = {k.removeprefix(f"{prefix}."): v for k, v in stored.items() if k.startswith(f"{prefix}.")}
    try:
        policy.load_state_dict(state)
    except RuntimeError as error:
        # Below a heading, a line for each kind of mismatch.
        reason = str(error).splitlines()[-1].strip()
        raise PolicyError(
            f"{folder / POLICY} does not fit the policy's options ({reason}): "
            f"set the options that it was trained with, or take another checkpoint"
        ) from error
    policy.normalizer.check()


def load_trainer(folder: Path) -> TrainerState:
    """The training state beside a checkpoint."""
    file = folder / TRAINER_JSON
    try:
        return TrainerState(json.loads(file.read_text()), read_tensors(folder / TRAINER))
    except (OSError, json.JSONDecodeError) as error:
        raise PolicyError(f"{file}: this checkpoint cannot be resumed: {_first_line(error)}") from error


def read_tensors(file: Path) -> dict[str, Tensor]:
    """Tensors by name; a truncated or foreign file is a PolicyError that names it."""
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        reason = f"is damaged or not a safetensors file ({_first_line(error)})"
        raise PolicyError(f"{file} {reason}: take another checkpoint, as RUN/best") from error


def _prefixed(prefix: str, policy: Policy) -> dict[str, Tensor]:
    return {f"{prefix}{key}": value.detach().to("cpu", copy=True) for key, value in policy.state_dict().items()}


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _sync(*paths: Path) -> None:
    """Push files to the disk before the rename, so that a power cut cannot leave a whole name on half a file."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
