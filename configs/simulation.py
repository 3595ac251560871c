"""Options of every command that steps a task."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class SimOptions:
    """Where the task is stepped.

    Attributes:
        backend: "gym" (any task), "threads" (MuJoCo tasks, batched on CPU threads), "ray" (any task, over Ray actors on
            one or many machines), "warp" (MuJoCo tasks in MuJoCo Warp, on the policy's device); what suits the task
            when not given.
        num_envs: environments in a batch; when not given, as many as suit the task.
        workers: processes or threads that they are dealt over, 0 for none beside the main process ("gym" only); when
            not given, as many as suit the task. "warp" takes none.
    """

    backend: str | None = None
    num_envs: int | None = None
    workers: int | None = None
