"""What a chunk was worth in every world, found after all of its steps have been made."""

from __future__ import annotations

from typing import NamedTuple

from flowsteer.sim.tasks.mujoco_task import Batch, MujocoTask, State, Xp

DIVERGED = 1e10
"""MuJoCo's own bound (mjMAXVAL) on positions and accelerations."""
FASTEST = 1e6
"""Of velocities, m/s or rad/s: what that acceleration makes within 0.1 ms, less than a physics step lasts."""


class Outcome(NamedTuple):
    """Of a chunk, [N] each; the words of `StepResult`."""

    reward_sum: Batch
    reward_max: Batch
    env_steps: Batch
    terminated: Batch
    truncated: Batch
    success: Batch
    lost: Batch


def sane(xp: Xp, state: State) -> Batch:
    """Whether worlds have not blown up, bool [...]."""
    bounded = xp.all(xp.abs(state.qpos) < DIVERGED, axis=-1) & xp.all(xp.abs(state.qvel) < FASTEST, axis=-1)
    return bounded & xp.isfinite(xp.sum(state.sensors, axis=-1))


def judge_chunk(
    xp: Xp, task: MujocoTask, before: State, actions: Batch, after: State, steps_left: Batch, sound: Batch
) -> Outcome:
    """Up to the first end of each world's episode; what comes after is masked.

    Args:
        xp: numpy or torch.
        task: whose episodes they are.
        before, after: states [N, Ta, ...] before and after each control step.
        actions: [N, Ta, Da].
        steps_left: [N] until the time limit.
        sound: bool [N, Ta], false where a step's result means nothing: there the episode ends and is lost. So it is
            where a reward is not finite, which then shows in `reward_sum`.
    """
    judged = task.judge(xp, before, actions, after)
    shown, sound = sound, sound & xp.isfinite(judged.reward)
    terminated = judged.terminated & sound
    steps = xp.arange(1, actions.shape[1] + 1, device=steps_left.device)
    over = terminated | ~sound | (steps >= steps_left[:, None])
    # No end before this step.
    executed = xp.cumsum(over * 1, axis=1) - over * 1 == 0
    counted = executed & sound
    by_rule, lost = xp.any(executed & terminated, axis=1), xp.any(executed & ~sound, axis=1)
    largest = xp.amax(xp.where(counted, judged.reward, -float("inf")), axis=1)
    return Outcome(
        reward_sum=xp.sum(xp.where(executed & shown, judged.reward, 0.0), axis=1),
        reward_max=xp.where(xp.any(counted, axis=1), largest, 0.0),
        env_steps=xp.sum(executed * 1, axis=1),
        terminated=by_rule,
        truncated=xp.any(over, axis=1) & ~by_rule & ~lost,
        success=xp.any(judged.success & counted, axis=1),
        lost=lost,
    )
