"""How smoothly chunks follow one another."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from flowsteer.sim.evaluate import Episode, Evaluation
from flowsteer.sim.spec import TaskSpec


def seams(evaluation: Evaluation) -> NDArray[np.float64]:
    """Jumps from the last executed action of a chunk to the first of the next, [n, Da] in physical units.

    Of the episodes that count; a chunk takes effect `delay_steps` after its decision.
    """
    width = evaluation.prediction.action_dim
    jumps = [_jumps(episode, evaluation.delay_steps, width) for episode in evaluation.kept]
    return np.concatenate([np.zeros((0, width)), *jumps])


def seam_sizes(evaluation: Evaluation, spec: TaskSpec) -> dict[str, float | None]:
    """Mean and 95th percentile of the jumps' sizes, without the discrete dimensions; None where there is no seam.

    `seam`, `seam_p95`: Euclidean, physical units; `seam_share`, `seam_share_p95`: as a share of the action's range, in
    the dimension where it is largest.
    """
    continuous = [dim for dim in range(spec.action_dim) if dim not in evaluation.prediction.discrete]
    jumps = seams(evaluation)[:, continuous]
    if not jumps.size:
        return dict.fromkeys(("seam", "seam_p95", "seam_share", "seam_share_p95"))
    widths = np.subtract(spec.action_high, spec.action_low)[continuous]
    sizes = {"seam": np.linalg.norm(jumps, axis=1), "seam_share": np.abs(jumps / widths).max(axis=1)}
    return {
        name + suffix: float(value)
        for name, size in sizes.items()
        for suffix, value in (("", size.mean()), ("_p95", np.quantile(size, 0.95)))
    }


def _jumps(episode: Episode, delay_steps: int, width: int) -> NDArray[np.float64]:
    actions = np.array(episode.actions, dtype=np.float64).reshape(-1, width)
    # The first chunk of an episode takes effect at once, and the last may never do.
    starts = [step + delay_steps for step, _ in episode.decisions[1:]]
    inside = np.array([step for step in starts if step < len(actions)], dtype=np.int64)
    return actions[inside] - actions[inside - 1]
