"""The convolutional network of Diffusion Policy (Chi et al. 2023), for long or smooth chunks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import final

import torch
from torch import Tensor, nn

from flowsteer.policies.errors import PolicyError
from flowsteer.policies.networks.base import Features, Network
from flowsteer.policies.networks.time import TimeEmbedding

GROUPS = 8
"""Groups of every GroupNorm."""


def convolve(width_in: int, width_out: int, kernel: int) -> nn.Sequential:
    """Convolution over time, norm and activation: [B, width_in, T] -> [B, width_out, T]."""
    return nn.Sequential(
        nn.Conv1d(width_in, width_out, kernel, padding=kernel // 2), nn.GroupNorm(GROUPS, width_out), nn.Mish()
    )


@final
class FilmBlock(nn.Module):
    """Two convolutions with feature-wise modulation (FiLM) between them, and a skip connection.

    Args:
        width_in: channels in.
        width_out: channels out.
        kernel: steps that a convolution sees.
        scale: modulate by scale and shift, otherwise by shift alone.
    """

    def __init__(self, width_in: int, width_out: int, kernel: int, scale: bool) -> None:
        super().__init__()
        self.first = convolve(width_in, width_out, kernel)
        self.second = convolve(width_out, width_out, kernel)
        self.skip = nn.Conv1d(width_in, width_out, 1) if width_in != width_out else nn.Identity()
        self.scale = scale
        self.film_width = width_out * (2 if scale else 1)

    def forward(self, h: Tensor, film: Tensor) -> Tensor:
        """Activations [B, width_in, T], modulation [B, film_width] -> [B, width_out, T]."""
        out: Tensor = self.second(self._modulate(self.first(h), film.unsqueeze(2))) + self.skip(h)
        return out

    def _modulate(self, h: Tensor, film: Tensor) -> Tensor:
        if not self.scale:
            return h + film
        shift, scale = film.chunk(2, dim=1)
        return torch.addcmul(shift, h, 1 + scale)


@final
class Stage(nn.Module):
    """Two blocks at one resolution."""

    def __init__(self, width_in: int, width_out: int, kernel: int, scale: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(FilmBlock(width, width_out, kernel, scale) for width in (width_in, width_out))

    def forward(self, h: Tensor, films: Iterator[Tensor]) -> Tensor:
        """Activations [B, width_in, T] -> [B, width_out, T]; takes the next two modulations."""
        for block in self.blocks:
            h = block(h, next(films))
        return h


@final
class ConditionalUnet1d(Network):
    """U-Net over the steps of the chunk, modulated by time and observation.

    As published, the finest resolution has no skip connection from the way down to the way up, and the observation
    enters through the modulation alone.

    Args:
        action_dim: Da.
        prediction_steps: Tp, a multiple of 2 ** (len(widths) - 1).
        observation_steps: To.
        feature_dim: F.
        widths: channels per resolution, finest first, multiples of 8.
        kernel: steps that a convolution sees, odd.
        time_width: width of the time embedding.
        scale: modulate by scale and shift, otherwise by shift alone.

    Raises:
        PolicyError: Tp, `widths` or `kernel` do not fit.
    """

    def __init__(
        self,
        action_dim: int,
        prediction_steps: int,
        observation_steps: int,
        feature_dim: int,
        widths: Sequence[int] = (256, 512, 1024),
        kernel: int = 5,
        time_width: int = 256,
        scale: bool = True,
    ) -> None:
        super().__init__(action_dim, prediction_steps, observation_steps, feature_dim)
        _check(prediction_steps, widths, kernel)
        levels = list(pairwise((action_dim, *widths)))
        self.down = nn.ModuleList(Stage(width_in, width_out, kernel, scale) for width_in, width_out in levels)
        self.shrink = nn.ModuleList(nn.Conv1d(width, width, 3, stride=2, padding=1) for width in widths[:-1])
        self.middle = Stage(widths[-1], widths[-1], kernel, scale)
        back = levels[:0:-1]
        self.up = nn.ModuleList(Stage(2 * width_out, width_in, kernel, scale) for width_in, width_out in back)
        self.grow = nn.ModuleList(nn.ConvTranspose1d(width, width, 4, stride=2, padding=1) for width, _ in back)
        self.output = nn.Sequential(convolve(widths[0], widths[0], kernel), nn.Conv1d(widths[0], action_dim, 1))

        for parameter in self.output[-1].parameters():
            nn.init.zeros_(parameter)
        # modules() follows the order of definition above, which is the order of use in `forward`.
        self.film_widths = [block.film_width for block in self.modules() if isinstance(block, FilmBlock)]
        self.time = TimeEmbedding(time_width, nn.Mish)
        self.time_film = nn.Linear(time_width, sum(self.film_widths))
        observed = observation_steps * feature_dim
        self.observation_film = nn.Sequential(nn.Mish(), nn.Linear(observed, sum(self.film_widths), bias=False))

    def embed_time(self, t: Tensor) -> Features:
        """Times [N] -> modulations [N, sum of the blocks' film widths]."""
        return (self.time_film(self.time(t)),)

    def embed_observation(self, features: Tensor) -> Features:
        """Encoded observations [B, To, F] -> modulations [B, sum of the blocks' film widths]."""
        return (self.observation_film(features.flatten(1)),)

    def forward(self, x: Tensor, time: Features, observation: Features) -> Tensor:
        """Noisy chunks [B, Tp, Da] -> prediction [B, Tp, Da]."""
        films = iter(torch.split(time[0] + observation[0], self.film_widths, dim=1))
        skips = []
        h = x.transpose(1, 2)
        for stage, shrink in zip(self.down, [*self.shrink, nn.Identity()], strict=True):
            skips.append(stage(h, films))
            h = shrink(skips[-1])
        h = self.middle(h, films)
        for stage, grow in zip(self.up, self.grow, strict=True):
            h = grow(stage(torch.cat([h, skips.pop()], dim=1), films))
        out: Tensor = self.output(h)
        return out.transpose(1, 2)


def _check(prediction_steps: int, widths: Sequence[int], kernel: int) -> None:
    if not widths or any(width < GROUPS or width % GROUPS for width in widths):
        raise PolicyError(f"widths of ConditionalUnet1d must be multiples of {GROUPS}, got {list(widths)}")
    if kernel < 1 or kernel % 2 == 0:
        raise PolicyError(f"kernel of ConditionalUnet1d must be odd, got {kernel}")
    multiple = 2 ** (len(widths) - 1)
    if prediction_steps % multiple:
        nearest = -(-prediction_steps // multiple) * multiple
        raise PolicyError(
            f"prediction_steps must be a multiple of {multiple} for a ConditionalUnet1d of {len(widths)} widths, "
            f"got {prediction_steps}; take {nearest} or fewer widths"
        )
