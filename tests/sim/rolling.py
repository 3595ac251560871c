"""The same episodes in one back end and another."""

import torch


def roll(backend, task, chunk_steps, chunks):
    """Everything that 5 environments show, 12 episodes long at most."""
    generator = torch.Generator().manual_seed(0)
    seen = []
    with backend(task, 5, 3) as env:
        seen.append(env.reset(range(12)))
        for _ in range(chunks):
            actions = 2 * torch.rand(5, chunk_steps, task.spec.action_dim, generator=generator) - 1
            result = env.step_chunk(actions)
            seen += [result.obs, result.final_obs, result.info]
            seen.append({"sum": result.reward_sum, "end": result.terminated, "limit": result.truncated})
            seen.append({"seeds": torch.tensor(env.seeds)})
    return seen
