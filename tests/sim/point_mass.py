"""A batch of point masses on a line, with the tensors and the order of events of an IsaacGymEnvs task."""

import torch

DT_S = 0.5


class PointMass:
    """Observes position and velocity; the action is a force, the reward the position.

    An episode ends by rule beyond 2 m, and after `max_episode_length` - 1 steps.
    """

    num_obs, num_acts = 2, 1
    dt, control_freq_inv, clip_obs = DT_S / 2, 2, 100.0
    gym = sim = viewer = None

    def __init__(self, num_envs, max_episode_length=7, device="cpu"):
        self.num_envs, self.max_episode_length = num_envs, max_episode_length
        self.device = self.rl_device = str(device)
        self._generator = torch.Generator(device).manual_seed(0)
        self.x, self.v = torch.zeros(2, num_envs, device=device)
        self.obs_buf = torch.zeros(num_envs, 2, device=device)
        self.rew_buf = torch.zeros(num_envs, device=device)
        self.reset_buf = torch.ones(num_envs, dtype=torch.long, device=device)
        self.timeout_buf = torch.zeros(num_envs, dtype=torch.long, device=device)
        self.progress_buf = torch.zeros(num_envs, dtype=torch.long, device=device)
        self.obs_dict, self.extras = {}, {}
        self.stepping, self.resets = False, 0

    def step(self, actions):
        self.stepping = True
        self.v += DT_S * actions[:, 0]
        self.x += DT_S * self.v
        self.post_physics_step()
        self.timeout_buf = (self.progress_buf >= self.max_episode_length - 1) & (self.reset_buf != 0)
        self.extras["time_outs"] = self.timeout_buf
        self.obs_dict["obs"] = torch.clamp(self.obs_buf, -self.clip_obs, self.clip_obs)
        self.stepping = False
        return self.obs_dict, self.rew_buf, self.reset_buf, self.extras

    def post_physics_step(self):
        self.progress_buf += 1
        env_ids = self.reset_buf.nonzero(as_tuple=False).squeeze(-1)
        if len(env_ids) > 0:
            self.reset_idx(env_ids)
        self.obs_buf[:] = torch.stack([self.x, self.v], dim=1)
        self.rew_buf[:] = self.x
        over = (self.x.abs() > 2) | (self.progress_buf >= self.max_episode_length - 1)
        self.reset_buf[:] = torch.where(over, torch.ones_like(self.reset_buf), self.reset_buf)

    def reset_idx(self, env_ids):
        self.resets += len(env_ids)
        self.x[env_ids] = torch.rand(len(env_ids), device=self.device, generator=self._generator) - 0.5
        self.v[env_ids] = 0
        self.progress_buf[env_ids] = 0
        self.reset_buf[env_ids] = 0
