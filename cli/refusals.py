"""Compose a config, or say in one line which override is wrong and what was probably meant."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard, final

from hydra import compose, initialize
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException, ValidationError

from flowsteer.cli.errors import UsageError, nearest, one_line, unknown

VERSION_BASE = "1.3"


@final
@dataclass(frozen=True)
class Composed:
    """A config and what was chosen for it: group -> name, None where nothing is."""

    config: DictConfig
    chosen: dict[str, str | None]


def compose_or_refuse(name: str, overrides: Sequence[str], *, sweep: bool = False) -> Composed:
    """The config `name` with `overrides`; of a sweep, every value is tried and the first of each is taken.

    Raises:
        UsageError: an unknown option or choice (naming the nearest), a wrong type, or a malformed override.
    """
    with initialize(version_base=VERSION_BASE, config_path=None):
        try:
            _check_deletions(overrides)
            _check_choices(overrides)
            jobs = [_compose(name, job) for job in _jobs(overrides, sweep)]
        except (HydraException, OmegaConfBaseException) as error:
            raise UsageError(_explain(name, overrides, error)) from error
        _check_structure(name, overrides, jobs[0].config)
    return jobs[0]


def _compose(name: str, overrides: Sequence[str]) -> Composed:
    config = compose(name, list(overrides), return_hydra_config=True)
    chosen = {g: c for g, c in config.hydra.runtime.choices.items() if not g.startswith("hydra/")}
    with open_dict(config):
        del config["hydra"]
    return Composed(config, chosen)


def options(config: DictConfig, prefix: str = "") -> Iterator[str]:
    """Every option of a config by its full name, `_target_` and the like left out."""
    for key in map(str, config):
        node = config._get_node(key)
        if is_node(node):
            yield from options(node, f"{prefix}{key}.")
        elif not key.startswith("_"):
            yield f"{prefix}{key}"


def is_node(value: Any) -> TypeGuard[DictConfig]:
    """Whether a value of a config holds options of its own."""
    return isinstance(value, DictConfig) and not value._is_none() and not value._is_missing() and len(value) > 0


def groups() -> dict[str, list[str]]:
    """The registered choices: group -> names."""
    store = ConfigStore.instance()
    tree = {str(key): value for key, value in store.repo.items() if isinstance(value, dict) and key != "hydra"}
    return {key: sorted(name.removesuffix(".yaml") for name in value) for key, value in tree.items()}


def parse(overrides: Sequence[str]) -> list[Override]:
    """Overrides as Hydra understands them.

    Raises:
        UsageError: one is malformed.
    """
    try:
        return OverridesParser.create().parse_overrides(list(overrides))
    except OverrideParseException as error:
        raise UsageError(_malformed(error.override, str(error))) from None
    except OmegaConfBaseException as error:
        raise UsageError(one_line(error)) from None


def _malformed(override: str, reason: str) -> str:
    if "=" not in override:
        return f"'{override}' is not of the form option=value; see --help"
    return f"'{override}' is malformed ({reason.splitlines()[1]}): quote special characters, as in \"option='a,b'\""


def _jobs(overrides: Sequence[str], sweep: bool) -> Iterator[list[str]]:
    """The first job of a sweep, then for each swept option one job for each further value."""
    values = [_values(override) if sweep else [str(override.input_line)] for override in parse(overrides)]
    first = [each[0] for each in values if each]
    yield first
    for swept in values:
        for value in swept[1:]:
            yield [value if line == swept[0] else line for line in first]


def _values(override: Override) -> list[str]:
    if not override.is_sweep_override():
        return [str(override.input_line)]
    if not override.is_discrete_sweep():
        return []
    return [f"{override.get_key_element()}={value}" for value in override.sweep_string_iterator()]


def _check_deletions(overrides: Sequence[str]) -> None:
    for override in parse(overrides):
        key = override.key_or_group
        if override.is_delete() and key not in groups() and not key.startswith("hydra"):
            raise UsageError(f"option '{key}' cannot be deleted")


def _check_choices(overrides: Sequence[str]) -> None:
    for override in parse(overrides):
        known = groups().get(override.key_or_group)
        if not known or override.is_sweep_override() or override.is_delete():
            continue
        if override.value() is None:
            key = override.key_or_group
            raise UsageError(f"{key}=null chooses nothing: leave {key}= out (known: {', '.join(known)})")
        if not isinstance(override.value(), str | list):
            raise unknown(override.key_or_group, str(override.value()), known)


def _check_structure(name: str, overrides: Sequence[str], config: DictConfig) -> None:
    """A node of options is chosen from its group and never replaced by a value; options are not new."""
    default = _compose(name, _choices(overrides)).config
    for override in parse(overrides):
        key = override.key_or_group
        if key in groups() or key.startswith("hydra"):
            continue
        if override.is_add() and not _is_open(default, key.rpartition(".")[0]):
            raise UsageError(_unknown_option(name, overrides, key))
        node = OmegaConf.select(default, key)
        if is_node(node) and not OmegaConf.is_dict(OmegaConf.select(config, key)):
            raise UsageError(f"'{key}' is not one option but several: {', '.join(options(node, f'{key}.'))}")


def _is_open(config: DictConfig, key: str) -> bool:
    """Whether `key` is a plain mapping, to which a user may add; such an option may be None until then."""
    node = OmegaConf.select(config, key) if key else config
    return (node is None and key in options(config)) or (OmegaConf.is_dict(node) and OmegaConf.get_type(node) is dict)


def _explain(name: str, overrides: Sequence[str], error: Exception) -> str:
    explain = next((e for kind, e in EXPLANATIONS.items() if isinstance(error, kind)), _explain_other)
    return explain(name, overrides, error)


def _explain_choice(name: str, overrides: Sequence[str], error: MissingConfigException) -> str:
    group, _, choice = str(error.missing_cfg_file).rpartition("/")
    known = error.options or []
    if not known:
        return one_line(error)
    return str(unknown(group, choice, known))


def _explain_composition(name: str, overrides: Sequence[str], error: ConfigCompositionException) -> str:
    cause = error.__cause__
    if isinstance(cause, ValidationError):
        return wrong_type(cause)
    text = str(error)
    if "Ambiguous value" in text:
        key = _quoted(text).strip("'").partition("=")[0]
        return f"option '{key}' has several values: add -m to run one job for each, or write {key}=[a,b] for a list"
    if isinstance(cause, OmegaConfBaseException) or text.startswith("Could not override"):
        return _unknown_option(name, overrides, _quoted(text).strip("'"))
    return one_line(error)


def _explain_other(name: str, overrides: Sequence[str], error: Exception) -> str:
    return one_line(error)


EXPLANATIONS: dict[type[HydraException], Callable[..., str]] = {
    MissingConfigException: _explain_choice,
    ConfigCompositionException: _explain_composition,
}


def _unknown_option(name: str, overrides: Sequence[str], key: str) -> str:
    choices = _choices(overrides)
    try:
        default = _compose(name, choices)
    except HydraException:
        default = _compose(name, [])
    if key in groups():
        taken = ", ".join(f"{g}={c}" for g, c in default.chosen.items() if g != key and c is not None)
        return f"nothing takes a {key} here ({taken})"
    if key in options(default.config) and _is_open(default.config, key):
        return f"add to option '{key}' with +{key}.NAME=VALUE"
    return f"no option '{key}'; nearest: {nearest(key, {*options(default.config), *default.chosen})}"


def _choices(overrides: Sequence[str]) -> list[str]:
    """The overrides that choose from a group, the first value of each where it is swept."""
    return [values[0] for o in parse(overrides) if o.key_or_group in groups() and (values := _values(o))]


def _quoted(text: str) -> str:
    found = re.search(r"'[^']*'", text)
    return found.group() if found else text


def wrong_type(error: OmegaConfBaseException) -> str:
    """What a value should have been."""
    reason = str(error.msg).splitlines()[0]
    remedy = f"; a list is written '{error.full_key}=[a,b]'" if "not a ListConfig" in reason else ""
    return f"option '{error.full_key}': {reason[:1].lower()}{reason[1:].rstrip('.')}{remedy}"
