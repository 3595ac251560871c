"""Configs -> objects, restricted to code that the user chose to install as part of the stack.

A checkpoint's config names classes by their dotted path and may have been downloaded, so a path is code that a
stranger asks to run. Only what is marked `configurable` and *defined* in the rooms below is ever called.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from flowsteer.policies.errors import PolicyError

ROOMS = tuple(f"flowsteer.{room}" for room in ("policies", "sim", "rl_finetune"))
"""Rooms of building blocks; commands and configs are not among them."""

OBJECT = "hydra_zen.funcs.get_obj"
"""How hydra-zen writes a function or class that is itself a value; understood here, never called."""


def build(config: Mapping[str, Any], **kwargs: Any) -> Any:
    """Call the `_target_` of `config` with its other entries, built first where they are configs themselves.

    Args:
        config: `_target_` is "package.module.Name"; `_partial_: true` gives a functools.partial instead of a call.
        kwargs: further arguments, passed as they are; they win over the config's.

    Raises:
        PolicyError: the target is foreign, unknown or does not take these arguments. Packages beside flowsteer are
            allowed by the environment variable FLOWSTEER_TRUST=package1,package2.
    """
    if "_target_" not in config:
        raise PolicyError(f"a config to build needs '_target_', got the keys {sorted(map(str, config))}")
    if config["_target_"] == OBJECT:
        return locate(config.get("path"))
    target = locate(config["_target_"])
    arguments = {str(key): _value(value) for key, value in config.items() if key not in ("_target_", "_partial_")}
    arguments |= kwargs
    partial = bool(config.get("_partial_", False))
    _check_arguments(config["_target_"], target, arguments, partial)
    return functools.partial(target, **arguments) if partial else target(**arguments)


def _value(value: Any) -> Any:
    if isinstance(value, Mapping):
        return build(value) if "_target_" in value else {key: _value(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [_value(item) for item in value]
    return value


def _check_arguments(path: str, target: Callable[..., Any], arguments: Mapping[str, Any], partial: bool) -> None:
    signature = inspect.signature(target)
    try:
        (signature.bind_partial if partial else signature.bind)(**arguments)
    except TypeError as error:
        raise PolicyError(f"the config of {path} does not fit its arguments: {error}") from None


def path_of(block: Callable[..., Any]) -> str:
    """How a config names a class or function; `locate` finds it again."""
    return f"{block.__module__}.{block.__qualname__}"


def locate(path: Any) -> Callable[..., Any]:
    """The public class or function "package.module.Name", which must be defined in a trusted package.

    Raises:
        PolicyError: the path leads elsewhere (also by an import inside a trusted module) or to nothing.
    """
    module_name, _, name = str(path).rpartition(".")
    if not _trusted(module_name) or any(part.startswith("_") for part in str(path).split(".")):
        raise _refusal(path, str(path).split(".")[0])
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        # A missing dependency of an existing module is another matter: its own message says what to install.
        if error.name is not None and (module_name + ".").startswith(error.name + "."):
            raise PolicyError(f"there is no '{path}': was the config written by another version?") from None
        raise
    found = getattr(module, name, None)
    if found is None:
        raise PolicyError(f"there is no '{path}': was the config written by another version?")
    if (
        not (inspect.isclass(found) or inspect.isfunction(found))
        or not _trusted(found.__module__)
        or not _marked(found)
    ):
        raise _refusal(path, str(getattr(found, "__module__", type(found).__module__)).split(".")[0])
    return found


def _extra() -> list[str]:
    return [package.strip() for package in os.environ.get("FLOWSTEER_TRUST", "").split(",") if package.strip()]


def _within(module_name: str, packages: Sequence[str]) -> bool:
    return any((module_name + ".").startswith(package + ".") for package in packages)


def _trusted(module_name: str) -> bool:
    return _within(module_name, [*ROOMS, *_extra()])


def _marked(found: Any) -> bool:
    """Whether our own code offers itself to configs; packages that the user trusts need no mark."""
    return getattr(found, "configurable", False) is True or _within(found.__module__, _extra())


def _refusal(path: Any, package: str) -> PolicyError:
    return PolicyError(
        f"the config asks to run '{path}', which is not a building block of flowsteer; "
        f"if you trust its author set FLOWSTEER_TRUST={package}"
    )
