"""What every policy family shares: the spec, the normaliser, the encoder, and the way in and out of physical units."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, final

import torch
from torch import Tensor, nn
from torch.nn import functional

from flowsteer.policies.choices import pick
from flowsteer.policies.encoders.base import EncoderFactory
from flowsteer.policies.errors import PolicyError
from flowsteer.policies.normalizer import KINDS, KeyStatistics, Normalizer
from flowsteer.policies.samplers import Generators
from flowsteer.policies.spec import PolicySpec, configurable

if TYPE_CHECKING:
    from flowsteer.policies.engine import Engine

Observation = Mapping[str, Tensor]
Draws = tuple[Tensor, ...]

ACTION = "action"


class Loss(NamedTuple):
    """A scalar to descend and its named parts (scalars, detached) for the log."""

    total: Tensor
    parts: dict[str, Tensor]


@configurable
class Policy(nn.Module, ABC):
    """A distribution over action chunks given observations.

    Concrete families are final and fill in `draw`, `_loss` and `_sample`; they never override the rest.

    Args:
        spec: the contract, stored in every checkpoint.
        encoder: builds the encoder from the observation specs.
        normalizers: "min_max", "mean_std" or "identity" per key, the action's under "action"; what is not named is
            "min_max", or as the encoder wants it.
        relative_to: a low-dimensional observation that the actions are the targets of: inside, the first channels of a
            chunk are relative to its last observed value; null for absolute actions.

    Raises:
        PolicyError: an option names what the policy does not observe or no normaliser, or is wider than the action.
    """

    differentiates: ClassVar[bool] = False
    """Whether an answer takes a gradient, and learning the gradient of that: whoever compiles must know."""

    def __init__(
        self,
        spec: PolicySpec,
        encoder: EncoderFactory,
        normalizers: Mapping[str, str] | None = None,
        relative_to: str | None = None,
    ) -> None:
        super().__init__()
        self.spec = spec
        self.encoder = encoder(spec.observations)
        self.normalizers = {**self.encoder.normalizers, **(normalizers or {})}
        widths = {key: math.prod(array.shape) for key, array in spec.observations.items() if array.dtype != "uint8"}
        unknown = set(self.normalizers) - {*widths, ACTION}
        if unknown:
            raise PolicyError(f"normalizers names {sorted(unknown)}, the policy has {sorted([*widths, ACTION])}")
        for key, kind in self.normalizers.items():
            pick(KINDS, kind, f"the normaliser of key '{key}'")
        if relative_to is not None and not widths.get(relative_to, math.inf) <= spec.action_dim:
            fitting = sorted(key for key, width in widths.items() if width <= spec.action_dim)
            raise PolicyError(
                f"policy.relative_to={relative_to} is no observation of at most {spec.action_dim} numbers, as wide as "
                f"the action; fitting: {', '.join(fitting) or 'none'}"
            )
        if relative_to is not None and any(dim < widths[relative_to] for dim in spec.discrete):
            raise PolicyError(
                f"policy.relative_to={relative_to} covers the first {widths[relative_to]} action dimensions, of which "
                f"discrete={list(spec.discrete)} names some: leave relative_to out"
            )
        self.relative_to = relative_to
        self.normalizer = Normalizer({**widths, ACTION: spec.action_dim})

    @property
    def noises(self) -> int:
        """How often [B, Tp, Da] normal numbers are drawn for a chunk after its starting noise."""
        return 0

    @abstractmethod
    def draw(self, batch_size: int, generator: torch.Generator | None = None) -> Draws:
        """The random numbers of one loss evaluation, each [B, ...], on the generator's device, without one on the CPU.

        Several processes share one draw.
        """

    @abstractmethod
    def _loss(self, features: Tensor, action: Tensor, draws: Draws) -> Loss:
        """Cloning loss of normalised chunks [B, Tp, Da] given features [B, To, F]."""

    @abstractmethod
    def _sample(self, features: Tensor, noise: Tensor | None, generator: Generators) -> Tensor:
        """Normalised chunks [B, Tp, Da]."""

    @final
    def fit_normalizer(self, statistics: Mapping[str, KeyStatistics]) -> None:
        """Take the exact statistics of the training split, keyed as the observations and "action"."""
        self.normalizer.fit(statistics, self.normalizers)
        if self.spec.discrete:
            self.normalizer.fit_levels(statistics, ACTION, self.spec.discrete, self.spec.discrete_scale)

    @final
    def features(self, obs: Observation) -> Tensor:
        """Normalise and encode observations {key: [B, To, ...]} -> [B, To, F].

        Raises:
            PolicyError: a key is missing or has another shape than the spec's, or an image is not uint8.
        """
        features: Tensor = self.encoder({key: self.normalized(key, obs) for key in self.spec.observations})
        return features

    @final
    def normalized(self, key: str, obs: Observation) -> Tensor:
        """An observation [B, To, ...] in network units, images as they are.

        Raises:
            PolicyError: it is missing or has another shape than the spec's, or an image is not uint8.
        """
        value = self.checked(key, obs)
        return value if self.spec.observations[key].dtype == "uint8" else self.normalizer.normalize(key, value)

    @final
    def checked(self, key: str, obs: Observation) -> Tensor:
        """An observation [B, To, ...] in physical units, as the spec has it.

        Raises:
            PolicyError: it is missing or has another shape than the spec's, or an image is not uint8.
        """
        array = self.spec.observations[key]
        if key not in obs:
            raise PolicyError(f"observation '{key}' is missing; got {sorted(obs)}")
        value = obs[key]
        if not isinstance(value, Tensor):
            kind = type(value).__name__
            raise PolicyError(f"observation '{key}' must be a tensor, got {kind}: see torch.as_tensor")
        wanted = (self.spec.observation_steps, *array.shape)
        if tuple(value.shape[1:]) != wanted:
            sizes = ", ".join(map(str, wanted))
            raise PolicyError(f"observation '{key}' must have shape [B, {sizes}], got {list(value.shape)}")
        if array.dtype == "uint8" and value.dtype != torch.uint8:
            raise PolicyError(f"observation '{key}' must be uint8 (0 to 255), got {value.dtype}")
        return value

    @final
    def relative(self, action: Tensor, obs: Observation) -> Tensor:
        """Chunks [B, Tp, Da] in physical units as this policy sees them: relative to what is observed, if it is so."""
        return action - self._origin(obs)

    @final
    def physical(self, a: Tensor, obs: Observation) -> Tensor:
        """Normalised chunks [B, Tp, Da] in physical units, absolute."""
        return self.normalizer.unnormalize(ACTION, a) + self._origin(obs)

    @final
    def loss(self, batch: Mapping[str, Any], draws: Draws | None = None) -> Loss:
        """Cloning loss of a batch {"obs": {key: [B, To, ...]}, "action": [B, Tp, Da]} in physical units."""
        action = self.normalizer.normalize(ACTION, self.relative(batch[ACTION], batch["obs"]))
        if draws is None:
            draws = self.draw(len(action))
        moved = tuple(draw.to(action.device) for draw in draws)
        return self._loss(self.features(batch["obs"]), action, moved)

    forward = loss

    @final
    @torch.no_grad()
    def predict(self, obs: Observation, *, noise: Tensor | None = None, generator: Generators = None) -> Tensor:
        """The whole chunk [B, Tp, Da] in physical units.

        Args:
            obs: {key: [B, To, ...]} in physical units.
            noise: [B, Tp, Da] the starting noise; drawn from `generator` when not given.
            generator: one for the batch or one per row.
        """
        return self.physical(self._sample(self.features(obs), noise, generator), obs)

    @final
    def act(self, obs: Observation, *, noise: Tensor | None = None, generator: Generators = None) -> Tensor:
        """The part of the chunk that is executed, [B, Ta, Da] in physical units; arguments as `predict`."""
        return self.predict(obs, noise=noise, generator=generator)[:, self.spec.executed]

    @final
    def compile_act(
        self, batch: int = 1, steps: int | None = None, dtype: str = "float32", engine: str = "fastest"
    ) -> Engine:
        """See `flowsteer.policies.engine.compile_act`."""
        # Not at the top: that module knows policies.
        from flowsteer.policies.engine import compile_act

        return compile_act(self, batch, steps, dtype, engine)

    def _origin(self, obs: Observation) -> Tensor | float:
        """What chunks are relative to, [B, 1, Da]."""
        if self.relative_to is None:
            return 0.0
        last = obs[self.relative_to][:, -1].flatten(1)
        return functional.pad(last, (0, self.spec.action_dim - last.shape[1]))[:, None]
