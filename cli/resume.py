"""`resume=DIR ...`: the config of a run, with further options on top."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from flowsteer.cli.application import Application
from flowsteer.cli.errors import UsageError, nearest, one_line
from flowsteer.cli.files import absolute
from flowsteer.cli.refusals import is_node, options, parse, wrong_type
from flowsteer.cli.training import CONFIG

RESUME = "resume"
FIXED = (
    *("checkpoint", "weights", "steps", "teacher_steps", "task", "horizon", "policy", "critic", "data"),
    *("algo.steps", "algo.fine_tuned_steps", "algo.eta"),
)
"""Options that say what a run's weights mean, or what they were learnt from."""


def resumed_run(args: Sequence[str]) -> Path | None:
    """The folder that `resume=` names, if it is there."""
    given = [arg.partition("=")[2] for arg in args if arg.startswith(f"{RESUME}=")]
    return Path(given[-1]).expanduser().absolute() if given and given[-1] not in ("", "null") else None


def resumed_config(
    application: Application, folder: Path, args: Sequence[str], free: Collection[str] = ()
) -> DictConfig:
    """The stored config of the run in `folder` with the other `args` applied.

    Args:
        application: the subcommand that made such runs.
        folder: the run.
        args: of the command line.
        free: what may change all the same of the options that are `FIXED`.

    Raises:
        UsageError: no run of this subcommand there, an unreadable config, an unknown option, a wrong type, a sweep, or
            a change of what the weights mean.
    """
    config = _stored(application, folder)
    for arg in args:
        if arg.startswith("out="):
            raise UsageError(f"'{arg}' cannot go with resume=: a run goes on where it is; copy the folder first")
        if not arg.startswith(f"{RESUME}="):
            _override(config, arg, application.paths, free)
    return config


def _stored(application: Application, folder: Path) -> DictConfig:
    file = folder / CONFIG
    try:
        config = OmegaConf.merge(OmegaConf.structured(application.config), OmegaConf.load(file))
    except FileNotFoundError:
        raise UsageError(f"resume={folder} holds no run ({CONFIG} is missing): name a folder made with out=") from None
    except ConfigKeyError as error:
        raise UsageError(
            f"resume={folder} holds no run of {application.command} ({one_line(error).partition(' full_key')[0]}): "
            "go on with the subcommand that made it"
        ) from error
    except (OSError, ValueError, AssertionError, yaml.YAMLError, OmegaConfBaseException) as error:
        raise UsageError(f"{file} is not the config of a run: {one_line(error)}") from error
    assert isinstance(config, DictConfig)
    OmegaConf.set_struct(config, False)
    config.pop("defaults", None)
    OmegaConf.set_struct(config, True)
    return config


def _override(config: DictConfig, arg: str, paths: Sequence[str], free: Collection[str]) -> None:
    if arg.startswith("-") or "=" not in arg:
        raise UsageError(f"'{arg}' cannot go with resume=; only option=value can")
    (override,) = parse([arg])
    key = override.key_or_group
    if override.is_sweep_override():
        raise UsageError(f"'{arg}' sweeps, but resume= continues one run")
    known = list(options(config))
    if key not in known:
        group = OmegaConf.select(config, key) if key in config else None
        why = f"'{key}' cannot be chosen anew when resuming" if is_node(group) else f"no option '{key}'"
        raise UsageError(f"{why}; nearest: {nearest(key, known)}")
    was = _value(config, key)
    try:
        OmegaConf.update(config, key, override.value())
    except OmegaConfBaseException as error:
        raise UsageError(wrong_type(error)) from None
    if key in paths and config[key] is not None:
        config[key] = absolute(config[key], Path.cwd())
    if f"{key}.".startswith(tuple(f"{name}." for name in FIXED)) and key not in free and _value(config, key) != was:
        raise UsageError(
            f"'{arg}' cannot go with resume=: the run was made with {key}={json.dumps(was)}; "
            f"leave it out or start another run"
        )


def _value(config: DictConfig, key: str) -> Any:
    value = OmegaConf.select(config, key)
    return OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
