"""`flowsteer bench latency`: time per chunk at batch 1, beside the plain loop over a `diffusers` scheduler.

And beside a floor: K times what this machine needs to multiply as much as the network does, or to read the weights that
it needs at every step (in the engine's dtype), whichever takes longer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from typing import Any, final

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from flowsteer.cli.bench import benchmark
from flowsteer.cli.checks import check_filled, check_positive
from flowsteer.cli.devices import find_device
from flowsteer.cli.errors import unknown
from flowsteer.cli.training import plain
from flowsteer.configs.groups import DENOISERS, ENCODERS, POLICIES
from flowsteer.datasets.key_statistics import KeyStatistics
from flowsteer.datasets.progress import ProgressBar
from flowsteer.policies.build import build
from flowsteer.policies.consistency import make_student, student_config
from flowsteer.policies.denoising import DenoisingPolicy
from flowsteer.policies.engine import Engine, compile_act
from flowsteer.policies.policy import ACTION
from flowsteer.policies.spec import ArraySpec, PolicySpec
from flowsteer.policies.timing import fastest_s, timed
from flowsteer.sim.errors import optional_module

SPEC = PolicySpec(
    {"state": ArraySpec((9,))}, action_dim=7, observation_steps=2, prediction_steps=16, execution_steps=8, control_hz=20
)
"""A 7-DoF arm's size."""
TRAIN_STEPS = 100
QUANTILES = {"p50": 0.5, "p95": 0.95, "p99": 0.99}


@final
@dataclass
class LatencyBenchmark:
    """Which policies, with freshly made weights.

    Attributes:
        policies: "diffusion", "flow", or "consistency", a student of flow with at most four steps.
        networks: names as in `flowsteer train`.
        network_options: of all these networks, e.g. +network_options.hidden=512.
        steps: K, denoising steps.
        engines: "eager" and "compiled", see `compile_act`.
        dtypes: of the engines.
        repeats: chunks that are timed of each contender, ten in a turn.
        device: "auto" or "cpu".
        name: of the file to write.
        out: where to write it.
    """

    policies: list[str] = field(default_factory=lambda: ["diffusion", "flow"])
    networks: list[str] = field(default_factory=lambda: list(DENOISERS))
    network_options: dict[str, Any] = field(default_factory=dict)
    steps: list[int] = field(default_factory=lambda: [1, 10])
    engines: list[str] = field(default_factory=lambda: ["eager", "compiled"])
    dtypes: list[str] = field(default_factory=lambda: ["float32"])
    repeats: int = 200
    device: str = "auto"
    name: str = "latency"
    out: str | None = None


DIFFUSERS, POLICY = "diffusers", "policy.act"
"""What engines are compared with: a loop over a scheduler of that package, or the policy itself where none fits."""
Chunk = Callable[[Tensor], Tensor]
"""Starting noise [1, Tp, Da] -> actions [1, Ta, Da] in physical units, for the same observation each time."""


def measure(config: DictConfig) -> dict[str, Any]:
    """A row per policy, network, number of steps and contender; times in milliseconds."""
    check_filled(config, "policies", "networks", "engines", "dtypes")
    check_positive(config, "steps", "repeats")
    device = find_device(config.device)
    gflops = matrix_product_gflops(device)
    rows: list[dict[str, Any]] = []
    weights: dict[str, int] = {}
    kinds = list(product(config.policies, config.networks, config.steps))
    with ProgressBar("building and racing", len(kinds), "policies") as bar:
        for family, network, steps in kinds:
            policy = make_policy(family, network, steps, config.network_options).to(device)
            weights[network] = sum(parameter.numel() for parameter in policy.network.parameters())
            facts = {"policy": family, "network": network, "steps": steps}
            floors = {dtype: steps * step_floor_ms(policy, gflops, size) for dtype, size in BYTES.items()}
            reference, loop = LOOPS[family]
            rows += [{**facts, **row} for row in _contest(policy, reference, loop(policy, steps), floors, config)]
            bar.advance()
    facts = {"device": str(device), "repeats": config.repeats, "weights": weights, "matrix_product_gflops": gflops}
    return {"rows": rows, **facts}


def _contest(
    policy: DenoisingPolicy, reference: str, loop: Chunk, floors: Mapping[str, float], config: DictConfig
) -> Iterator[dict[str, Any]]:
    """A row for the plain loop, called `reference`, and for each engine."""
    built, obs = engines(policy, config), _observation(policy)
    contenders: dict[str, Chunk] = {reference: loop}
    contenders.update((name, partial(_act, engine, obs)) for name, engine in built.items())
    times = {name: _quantiles(taken) for name, taken in _race(contenders, config.repeats, policy.grid.device).items()}
    ways = {reference: {"dtype": "float32", "form": "plain", "threads": torch.get_num_threads()}}
    ways |= {name: {key: getattr(engine.chosen, key) for key in ways[reference]} for name, engine in built.items()}
    for name, way in ways.items():
        yield {"contender": name, **way, **_scores(times[name], times[reference], floors[str(way["dtype"])])}


def make_policy(family: str, network: str, steps: int, options: Mapping[str, Any] | None = None) -> DenoisingPolicy:
    """A policy for `SPEC`; unclipped, because the schedulers clip otherwise, and with no layer left at zero."""
    for kind, name, known in (("policy", family, LOOPS), ("network", network, DENOISERS)):
        if name not in known:
            raise unknown(kind, name, known)
    structured = OmegaConf.structured(DENOISERS[network])
    for option in options or {}:
        if option not in structured:
            raise unknown(f"option of {network}", option, [key for key in structured if not key.startswith("_")])
    parts = {"network": {**structured, **(options or {})}, "encoder": ENCODERS["low_dim"], "steps": steps, "clip": None}
    torch.manual_seed(0)
    taught = "flow" if family == "consistency" else family
    config = OmegaConf.merge(OmegaConf.structured(POLICIES[taught]["policy"]), parts)
    assert isinstance(config, DictConfig)
    policy: DenoisingPolicy = build(config, spec=SPEC)
    if taught != family:
        policy = make_student(policy, student_config(policy, plain(config), steps))
    for parameter in policy.network.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    policy.fit_normalizer({"state": _unit_range(9), ACTION: _unit_range(SPEC.action_dim)})
    return policy.eval()


def _unit_range(width: int) -> KeyStatistics:
    ones = np.ones(width)
    return KeyStatistics(min=-ones, max=ones, mean=0 * ones, std=ones, count=1)


def engines(policy: DenoisingPolicy, config: DictConfig) -> dict[str, Engine]:
    """By name and dtype.

    Raises:
        PolicyError: one cannot be built here.
    """
    built: dict[str, Engine] = {}
    for engine, dtype in product(config.engines, config.dtypes):
        name = engine if dtype == "float32" else f"{engine} {dtype}"
        built[name] = compile_act(policy, dtype=dtype, engine=engine)
    return built


def _act(act: Engine, obs: dict[str, Tensor], noise: Tensor) -> Tensor:
    """As a robot calls it."""
    return act(obs, noise=noise)


def diffusion_loop(policy: DenoisingPolicy, steps: int) -> Chunk:
    """DDIM on the same grid: timesteps 99, 89, ... 9 are t = 1.0, 0.9, ... 0.1."""
    scheduler = optional_module("diffusers", "dev").DDIMScheduler(
        TRAIN_STEPS,
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        clip_sample=False,
    )
    obs = _observation(policy)

    def chunk(x: Tensor) -> Tensor:
        features = policy.features(obs)
        scheduler.set_timesteps(steps, device=x.device)
        for timestep in scheduler.timesteps:
            t = ((timestep + 1) / TRAIN_STEPS).expand(len(x))
            x = scheduler.step(_network(policy, x, t, features), timestep, x).prev_sample
        return policy.normalizer.unnormalize(ACTION, x)[:, SPEC.executed]

    return chunk


def flow_loop(policy: DenoisingPolicy, steps: int) -> Chunk:
    """Euler steps of flow matching at t = 1, 1 - 1/K, ..."""
    scheduler = optional_module("diffusers", "dev").FlowMatchEulerDiscreteScheduler()
    obs = _observation(policy)

    def chunk(x: Tensor) -> Tensor:
        features = policy.features(obs)
        scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps).tolist(), device=x.device)
        for timestep in scheduler.timesteps:
            t = (timestep / scheduler.config.num_train_timesteps).expand(len(x))
            x = scheduler.step(_network(policy, x, t, features), timestep, x).prev_sample
        return policy.normalizer.unnormalize(ACTION, x)[:, SPEC.executed]

    return chunk


def policy_loop(policy: DenoisingPolicy, steps: int) -> Chunk:
    """The policy itself."""
    obs = _observation(policy)
    return lambda x: policy.act(obs, noise=x)


LOOPS: dict[str, tuple[str, Callable[[DenoisingPolicy, int], Chunk]]] = {
    "diffusion": (DIFFUSERS, diffusion_loop),
    "flow": (DIFFUSERS, flow_loop),
    "consistency": (POLICY, policy_loop),
}


def _network(policy: DenoisingPolicy, x: Tensor, t: Tensor, features: Tensor) -> Tensor:
    """The whole network at every step, as common code calls it."""
    network = policy.network
    out: Tensor = network(x, network.embed_time(t), network.embed_observation(features))
    return out


def _observation(policy: DenoisingPolicy) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    state = torch.randn(1, SPEC.observation_steps, *SPEC.observations["state"].shape, generator=generator)
    return {"state": state.to(policy.grid.device)}


@torch.no_grad()
def _race(contenders: dict[str, Chunk], repeats: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each chunk; the contenders take turns, so that a disturbance meets all of them.

    A turn is several chunks, of which the first count for nothing: they find what others left in the caches.
    """
    taken: dict[str, list[float]] = {name: [] for name in contenders}
    noises = list(_noises(COLD + WARM, device))
    for _ in range(-(-repeats // WARM)):
        for name, chunk in contenders.items():
            seconds = [timed(partial(chunk, noise), device)[1] for noise in noises]
            taken[name] += seconds[COLD:]
    return taken


COLD, WARM = 3, 10
"""Chunks of a turn."""


def _noises(count: int, device: torch.device) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(2)
    for _ in range(count):
        yield torch.randn(1, SPEC.prediction_steps, SPEC.action_dim, generator=generator).to(device)


def _quantiles(seconds: Iterable[float]) -> dict[str, float]:
    milliseconds = 1e3 * np.array(list(seconds))
    return {name: float(np.quantile(milliseconds, q)) for name, q in QUANTILES.items()}


def _scores(times: Mapping[str, float], loop: Mapping[str, float], floor_ms: float) -> dict[str, float]:
    """Of one contender, beside the loop and the floor."""
    p50 = times["p50"]
    of_others = {"x_loop": loop["p50"] / p50, "floor_ms": floor_ms, "of_floor": floor_ms / p50}
    return {**{f"{quantile}_ms": value for quantile, value in times.items()}, **of_others}


def matrix_product_gflops(device: torch.device, size: int = 1024) -> float:
    """How fast this machine multiplies, at best."""
    a = torch.ones(size, size, device=device)
    return 2e-9 * size**3 / fastest_s(lambda: a @ a, device, PROBES)


PROBES = 20
"""Measurements of the machine, of which the fastest counts."""
BYTES = {"float32": 4, "bfloat16": 2}
"""Of a weight."""


def step_floor_ms(policy: DenoisingPolicy, gflops: float, size: int) -> float:
    """A lower bound of one step at batch 1: its products at that rate, or reading its weights of `size` bytes each."""
    network, grid = policy.network, policy.grid
    x = torch.zeros(1, SPEC.prediction_steps, SPEC.action_dim, device=grid.device)
    with torch.no_grad():
        time_features, cond = (
            network.embed_time(grid[:1]),
            network.embed_observation(policy.features(_observation(policy))),
        )
    with FlopCounterMode(display=False) as counter:
        out = network(x, time_features, cond)
    # What does not touch the noisy chunk is computed once per chunk, or beforehand.
    used = torch.autograd.grad(out.sum(), list(network.parameters()), allow_unused=True)
    weights = sum(gradient.numel() for gradient in used if gradient is not None)
    buffer = torch.ones(weights * size // 4, device=grid.device)
    products_s: float = 1e-9 * counter.get_total_flops() / gflops
    return 1e3 * max(products_s, fastest_s(buffer.sum, grid.device, PROBES))


main = benchmark(
    "latency", "Time per chunk at batch 1, beside a plain loop over a diffusers scheduler.", LatencyBenchmark, measure
)
