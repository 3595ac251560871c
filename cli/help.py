"""The text of `flowsteer SUBCOMMAND --help`: choices, options, their defaults and what they mean."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterator
from typing import Any

from omegaconf import DictConfig, OmegaConf

from flowsteer.cli.refusals import Composed, groups, is_node
from flowsteer.policies.build import locate


def help_text(command: str, summary: str, composed: Composed) -> str:
    """Everything that can be set, with the values that `composed` holds."""
    choices = "[choice=name ...] " if composed.chosen else ""
    lines = [f"{command}: {summary}", "", f"usage: {command} option=value ... {choices}[-m]", ""]
    if composed.chosen:
        known = groups()
        rows = [(f"{g}={'null' if c is None else c}", " | ".join(known[g])) for g, c in composed.chosen.items()]
        lines += ["choices (each brings its own options)", *_aligned(rows), ""]
    lines += ["options and their values now (??? must be given)", *_aligned(list(_rows(composed.config, "")))]
    lines += [
        "",
        "  -m, --multirun  one job for each value of option=a,b",
        "  --cfg job       print the config and stop",
    ]
    return "\n".join(lines)


def _rows(config: DictConfig, prefix: str) -> Iterator[tuple[str, str]]:
    meanings = _meanings(config)
    for key in map(str, config):
        node = config._get_node(key)
        if is_node(node):
            yield from _rows(node, f"{prefix}{key}.")
        elif not key.startswith("_"):
            yield f"{prefix}{key}={_written(node)}", meanings.get(key, "")


def _written(node: Any) -> str:
    """A value as it is written on the command line."""
    value = OmegaConf.to_container(node) if OmegaConf.is_config(node) else node._value()
    return value if isinstance(value, str) else json.dumps(value)


def _meanings(config: DictConfig) -> dict[str, str]:
    """What the docstrings say of a node's options: of the class that it configures, and of its own."""
    target = config.get("_target_")
    documented: list[Any] = [OmegaConf.get_type(config), *([] if target is None else [locate(target)])]
    bases = [base for each in documented for base in reversed(inspect.getmro(each))]
    return {name: text for base in bases for name, text in descriptions(base).items()}


def descriptions(target: Any) -> dict[str, str]:
    """The entries "name: text" of a docstring, each on one line; entries may go on on deeper lines."""
    entry = r"^( *)(\w+): (.+(?:\n\1 +.+)*)"
    entries = re.findall(entry, inspect.cleandoc(target.__doc__ or ""), re.MULTILINE)
    return {name: " ".join(text.split()) for _, name, text in entries}


def _aligned(rows: list[tuple[str, str]]) -> list[str]:
    width = min(48, max(len(option) for option, _ in rows))
    return [f"  {option:{width}}  {meaning}".rstrip() for option, meaning in rows]
