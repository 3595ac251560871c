"""Environments dealt over workers that may die: who has which, what came of a chunk, who has died how often."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any, final

import numpy as np

from flowsteer.sim.errors import SimError
from flowsteer.sim.slot import OUTCOME, Outcomes

START_TIMEOUT_S = 300.0
"""A fresh worker imports its simulator, which may compile on first use."""
CLOSE_TIMEOUT_S = 2.0
"""What all workers together get to end by themselves."""
MAX_DEATHS = 3
"""So many deaths of one worker without a finished chunk in between, and the pool gives up."""


@final
class Dealing:
    """`num_envs` environments, of which worker w of W has w, w + W, w + 2 W, ...

    Args:
        worker: how messages name a worker.
        remedy: what to do where workers keep dying.
        close: ends the pool, before an error does.
    """

    def __init__(self, num_envs: int, workers: int, worker: str, remedy: str, close: Callable[[], None]) -> None:
        self.indices = [tuple(range(w, num_envs, workers)) for w in range(min(workers, num_envs))]
        self._worker, self._remedy, self._close = worker, remedy, close
        self._deaths: Counter[int] = Counter()

    def parts(self, envs: Iterable[int]) -> dict[int, list[int]]:
        """{worker: those of `envs` that it has}, without the workers that have none."""
        named = set(envs)
        parts = {w: [i for i in own if i in named] for w, own in enumerate(self.indices)}
        return {w: part for w, part in parts.items() if part}

    def collect(self, envs: Iterable[int], answers: Mapping[int, tuple[Any, set[int]]]) -> tuple[Outcomes, set[int]]:
        """See `Pool.run`, of {worker: the outcomes of its part of `envs`, the environments that were lost there}."""
        place = {i: row for row, i in enumerate(envs)}
        outcomes, lost, parts = np.zeros(len(place), dtype=OUTCOME), set(place), self.parts(place)
        for w, (rows, gone) in answers.items():
            self._deaths[w] = 0
            outcomes[[place[i] for i in parts[w]]] = rows
            lost -= set(parts[w]) - gone
        return outcomes, lost

    def bury(self, w: int, how: str) -> None:
        """Warn of the death of the worker w.

        Raises:
            SimError: it has died too often.
        """
        self._deaths[w] += 1
        what = f"{self._worker} of environments {list(self.indices[w])} {how}"
        if self._deaths[w] >= MAX_DEATHS:
            self._close()
            raise SimError(f"{what}, {MAX_DEATHS} times in a row: {self._remedy}")
        warnings.warn(f"{what}; their episodes are lost and a new worker takes over", RuntimeWarning, stacklevel=3)
