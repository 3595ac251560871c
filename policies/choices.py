"""Named choices: a table of callables and one line for a name that is not in it."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from typing import TypeVar

from flowsteer.policies.errors import PolicyError

T = TypeVar("T")


def pick(table: Mapping[str, T], name: str, what: str) -> T:
    """`table[name]`.

    Raises:
        PolicyError: naming the nearest choice and all of them.
    """
    if name not in table:
        nearest = get_close_matches(str(name), table, n=1, cutoff=0.0)
        raise PolicyError(f"{what} '{name}' is unknown; nearest: {nearest[0]} (known: {', '.join(sorted(table))})")
    return table[name]
