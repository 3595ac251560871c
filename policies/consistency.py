"""Consistency policies: diffusion and flow policies distilled to a few jumps of one network evaluation each."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, final

from torch import Tensor

from flowsteer.policies.build import build, path_of
from flowsteer.policies.denoising import DenoisingPolicy, DiffusionPolicy, FlowPolicy
from flowsteer.policies.encoders.base import EncoderFactory
from flowsteer.policies.errors import PolicyError
from flowsteer.policies.networks.base import Network, NetworkFactory
from flowsteer.policies.networks.staged import StagedNetwork
from flowsteer.policies.paths import Path, Prediction, VariancePreservingPath, expand
from flowsteer.policies.policy import Policy
from flowsteer.policies.spec import PolicySpec

MAX_STEPS = 4
TEACHERS = (DiffusionPolicy, FlowPolicy)


@final
class ConsistencyPolicy(DenoisingPolicy):
    """A student of N = 1 to 4 steps; with N = 1 its `denoise` is the whole way from noise to a clean chunk.

    From time t, the transition with its a_hat = g(x_t, t) lands on the teacher's trajectory at s, the next time of the
    N-step grid (CTM, Kim et al. 2024, with that s alone: multistep consistency models, Heek et al. 2024):

        G(x_t, t, s) = sigma_s / sigma_t x_t + (alpha_s - alpha_t sigma_s / sigma_t) g(x_t, t)

    So N transitions with eta = 0 end where the teacher's end, and noise -> chunk is a deterministic map. A student that
    jumps to the clean chunk from every t would need fresh noise after each jump (Song et al. 2023): put back on the
    path with its own eps_hat, its x_s would be far too large, since a and eps lie on one trajectory and add up.

        g(x, t) = c_skip(t) x + c_out(t) a_hat(x, t),   c_skip = b^2 / (t^2 + b^2),   c_out = t / sqrt(t^2 + b^2)

    is exact at t = 0 whatever the network says, and what the teacher's network would predict at t >> b.

    Args:
        spec, encoder, network, prediction, min_time, start, clip, normalizers, relative_to: the teacher's, see
            `DenoisingPolicy`.
        path: the teacher's alpha(t), sigma(t).
        steps: N; sampled with any other number of steps, it would not end where the teacher does.
        eta: 0 for a deterministic map from noise to chunk; more where fine-tuning explores with it.
        solver: "transition"; solvers of an ODE have no use for jumps.
        boundary: b, the time up to which a chunk is mostly left as it is.

    Raises:
        PolicyError: an option is out of its range.
    """

    def __init__(
        self,
        spec: PolicySpec,
        encoder: EncoderFactory,
        network: NetworkFactory,
        path: Path,
        prediction: str,
        min_time: float,
        steps: int = 1,
        start: float = 1.0,
        eta: float = 0.0,
        solver: str = "transition",
        clip: float | None = 1.0,
        boundary: float = 0.01,
        normalizers: Mapping[str, str] | None = None,
        relative_to: str | None = None,
    ) -> None:
        if not 1 <= steps <= MAX_STEPS:
            raise PolicyError(f"steps must be from 1 to {MAX_STEPS} in a consistency policy, got {steps}")
        if solver != "transition":
            raise PolicyError(f"policy.solver={solver} follows an ODE, a consistency policy jumps: leave it out")
        if not boundary > 0:
            raise PolicyError(f"policy.boundary must be positive, got {boundary:g}")
        numbers = (prediction, "uniform", min_time, steps, start, eta, solver, clip)
        super().__init__(spec, encoder, network, path, *numbers, normalizers, relative_to)
        self.to_clean = partial(_jump, self.to_clean, min_time, boundary)
        self.target = _no_target
        self.fixed_steps = steps


def _jump(
    to_clean: Prediction, min_time: float, boundary: float, path: Path, x_t: Tensor, out: Tensor, t: Tensor
) -> Tensor:
    """g(x_t, t), see `ConsistencyPolicy`."""
    c_skip = boundary**2 / (t**2 + boundary**2)
    c_out = t / (t**2 + boundary**2).sqrt()
    # Some predictions have no a_hat at t = 0; where it counts for nothing, it must not be NaN.
    a_hat = to_clean(path, x_t, out, t.clamp(min=min_time))
    return expand(c_skip, x_t) * x_t + expand(c_out, x_t) * a_hat


def _no_target(path: Path, a: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    raise PolicyError("a consistency policy has no denoising loss: it learns from its teacher, with flowsteer distill")


def make_teacher(policy: Policy, steps: int | None = None) -> DenoisingPolicy:
    """`policy` as a deterministic map from noise to chunk: eta = 0, its own solver, K = `steps` where given.

    Raises:
        PolicyError: it is no diffusion or flow policy, or has not learnt the times of so many steps.
    """
    if not isinstance(policy, TEACHERS):
        raise PolicyError(f"{type(policy).__name__} cannot be distilled: name a diffusion or flow policy")
    if steps is not None:
        policy.set_steps(steps)
    policy.eta = 0.0
    return policy.eval().requires_grad_(False)


def student_config(teacher: DenoisingPolicy, config: Mapping[str, Any], steps: int) -> dict[str, Any]:
    """The "policy" of a checkpoint that rebuilds a student, from that of its teacher."""
    network = config["network"]
    while network["_target_"] == path_of(StagedNetwork):
        network = network["network"]
    options = {key: config[key] for key in ("normalizers", "relative_to") if key in config}
    return {
        "_target_": path_of(ConsistencyPolicy),
        "encoder": config["encoder"],
        "network": network,
        "path": _path_config(teacher.path),
        "prediction": teacher.prediction,
        "min_time": teacher.min_time,
        "steps": steps,
        "start": teacher.grid[0].item(),
        "clip": teacher.clip,
        **options,
    }


def make_student(teacher: DenoisingPolicy, config: Mapping[str, Any]) -> ConsistencyPolicy:
    """The student of `student_config`, with weights, encoder and normaliser of its teacher; the encoder stays so.

    Of a fine-tuned teacher that has two networks it takes the tuned one, a copy of the other until it was tuned.

    Raises:
        PolicyError: it has more steps than its teacher, or an option is out of its range.
    """
    student: ConsistencyPolicy = build(config, spec=teacher.spec)
    own, known = len(student.grid) - 1, len(teacher.grid) - 1
    if own > known:
        raise PolicyError(f"a student of steps={own} has nothing to learn from a teacher of {known}: lower steps")
    network: Network = teacher.network
    while isinstance(network, StagedNetwork):
        network = network.late
    for part, source in ((student.encoder, teacher.encoder), (student.normalizer, teacher.normalizer)):
        part.load_state_dict(source.state_dict())
    student.network.load_state_dict(network.state_dict())
    student.encoder.requires_grad_(False)
    return student


def _path_config(path: Path) -> dict[str, Any]:
    config: dict[str, Any] = {"_target_": path_of(type(path))}
    if isinstance(path, VariancePreservingPath):
        config |= {"betas": {"_target_": path_of(path.betas), "_partial_": True}, "train_steps": path.train_steps}
    return config
