"""`act` for one batch size, as fast as this machine allows: what is fastest is measured when it is built, not assumed.

At batch 1 a CPU waits for the weights of each layer, so they are laid out for few rows (few_rows.py); the embeddings
of the K times are computed beforehand. torch.compile sees the whole chunk at once, encoder, K steps and normaliser,
fuses what is elementwise and plans the memory of all steps. Of a large network it sees a step, since compiling takes as
long as the program.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any, final

import torch
from torch import Tensor

from flowsteer.policies.choices import pick
from flowsteer.policies.denoising import DenoisingPolicy
from flowsteer.policies.errors import PolicyError
from flowsteer.policies.few_rows import with_packed_weights
from flowsteer.policies.policy import ACTION, Observation, Policy
from flowsteer.policies.samplers import Drawn, Generators, randn
from flowsteer.policies.short_convolutions import with_products
from flowsteer.policies.spec import ArraySpec
from flowsteer.policies.timing import timed

Run = Callable[[dict[str, Tensor], Tensor, Tensor], Tensor]
"""Observations, starting noise [B, Tp, Da], noise of the steps [n, B, Tp, Da] -> executed actions [B, Ta, Da]."""

Form = tuple[Policy, torch.dtype]
"""What is computed, and in which dtype."""
Maker = Callable[[Policy, torch.dtype], Run]

TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
"""Largest error of an engine against the policy itself, in normalised units; one that errs more is not taken."""
DTYPES: dict[str, tuple[torch.dtype, ...]] = {
    "float32": (torch.float32,),
    "bfloat16": (torch.bfloat16,),
    "auto": (torch.float32, torch.bfloat16),
}
REPEATS = 30
LONGEST_PROGRAM = 700
"""Most layers in one program, those of every step counted: ten steps of the MLP have 330, of the U-Net 1,000."""


@final
@dataclass(frozen=True)
class Candidate:
    """A way to run a policy, as it was measured.

    name: of the engine; "none" for a form that cannot be had here.
    form: how its layers are written, see `FORMS`.
    threads: of the CPU.
    chunk_ms: median time of a chunk; None if it cannot be taken, for the reason in `refused`.
    error: largest against the policy itself, in normalised units.
    """

    name: str
    dtype: str
    form: str
    threads: int
    chunk_ms: float | None = None
    error: float | None = None
    refused: str | None = None


@final
class Engine:
    """A policy's `act` for batches of one size, with weights as they were when it was built.

    Attributes:
        candidates: what was measured.
        chosen: the fastest of them.
    """

    def __init__(self, policy: Policy, batch: int, built: Sequence[tuple[Candidate, Run]]) -> None:
        self._policy, self._batch = policy, batch
        self.candidates = [candidate for candidate, _ in built]
        self.chosen, self._run = _fastest(built)

    def __call__(self, obs: Observation, *, noise: Tensor | None = None, generator: Generators = None) -> Tensor:
        """See `Policy.act`; the same random numbers give the same actions.

        Raises:
            PolicyError: the batch is of another size, or an observation is not what the policy knows.
        """
        spec = self._policy.spec
        sizes = {key: len(obs[key]) for key in spec.observations if key in obs}
        wrong = next((key for key, size in sizes.items() if size != self._batch), None)
        if wrong is not None:
            raise PolicyError(
                f"this engine was built for batches of {self._batch}, observation '{wrong}' has {sizes[wrong]}: "
                "build another with compile_act"
            )
        # As it was built: with gradients, or with tensors of inference mode, it would silently be compiled anew.
        with _threads(self.chosen.threads), torch.inference_mode(False), torch.no_grad():
            known = {key: _ordinary(obs[key]) for key in sizes}
            start, later = draw(self._policy, self._batch, noise, generator)
            return self._run(known, _ordinary(start), later)


def compile_act(
    policy: Policy, batch: int = 1, steps: int | None = None, dtype: str = "float32", engine: str = "fastest"
) -> Engine:
    """Build the engine of a policy; takes minutes where there is a compiler, the longer the larger the network and K.

    Args:
        policy: is copied, later changes of its weights do not reach the engine.
        batch: B.
        steps: K, denoising steps; the policy's own where not given.
        dtype: "float32", "bfloat16", or "auto" for the faster of the two.
        engine: "eager", "compiled", or "fastest" for the faster of the two; what cannot be built here, for lack of a
            compiler say, is then left out, and `Engine.candidates` holds the reason.

    Raises:
        PolicyError: an option is out of its range, or no candidate works and is exact enough.
    """
    if batch < 1:
        raise PolicyError(f"batch must be at least 1, got {batch}")
    frozen = frozen_copy(policy, steps)
    runs = ENGINES if engine == "fastest" else {engine: pick(ENGINES, engine, "engine")}
    data = _Trial(frozen, batch)
    with torch.no_grad():
        if isinstance(frozen, DenoisingPolicy):
            frozen.freeze_times()
        built = [attempt for kind in pick(DTYPES, dtype, "dtype") for attempt in _built(frozen, kind, data, runs)]
    return Engine(frozen, batch, built)


def _built(policy: Policy, dtype: torch.dtype, data: _Trial, runs: Mapping[str, Maker]) -> list[tuple[Candidate, Run]]:
    """The engines in `runs`, each of the best form and number of threads; then what forms cannot be had, and why."""
    kind = str(dtype).removeprefix("torch.")
    forms: dict[str, Form] = {}
    refused = []
    for name, make in FORMS.items():
        try:
            forms[name] = make(policy, dtype)
        except PolicyError as error:
            refused.append((Candidate("none", kind, name, torch.get_num_threads(), refused=str(error)), _refused))
    form, threads = _best_start(forms, data)
    with _threads(threads):
        built = [
            data.measure(Candidate(name, kind, form, threads), partial(engine, *forms[form]), TOLERANCES[dtype])
            for name, engine in runs.items()
        ]
    return built + refused


def draw(policy: Policy, batch: int, noise: Tensor | None, generator: Generators) -> tuple[Tensor, Tensor]:
    """The random numbers of `Policy.act` in its order: the starting noise, then that of the steps [n, B, Tp, Da]."""
    shape, device = (batch, policy.spec.prediction_steps, policy.spec.action_dim), _device(policy)
    start = randn(shape, generator, device) if noise is None else noise
    later = [randn(shape, generator, device) for _ in range(policy.noises)]
    return start, torch.stack(later) if later else torch.empty(0, *shape, device=device)


def _plain(policy: Policy, dtype: torch.dtype) -> Form:
    return policy, dtype


def _products(policy: Policy, dtype: torch.dtype) -> Form:
    changed = copy.deepcopy(policy)
    with_products(changed)
    return changed, dtype


def _packed(policy: Policy, dtype: torch.dtype) -> Form:
    changed, _ = _products(policy, dtype)
    if not isinstance(changed, DenoisingPolicy) or _device(policy).type != "cpu":
        raise PolicyError("weights are packed for denoising on a CPU only")
    with_packed_weights(changed.network, dtype)
    return changed, torch.float32


FORMS: dict[str, Callable[[Policy, torch.dtype], Form]] = {"packed": _packed, "products": _products, "plain": _plain}
"""Of a policy: as it is; with matrix products for short convolutions; with weights packed for few rows as well, which
alone are of the dtype then."""


def _eager(policy: Policy, dtype: torch.dtype) -> Run:
    """The policy as it is."""

    def run(obs: dict[str, Tensor], noise: Tensor, later: Tensor) -> Tensor:
        with torch.autocast(noise.device.type, dtype, enabled=dtype != torch.float32):
            return policy.act(obs, noise=noise, generator=Drawn(later)).float()

    return run


def _compiled(policy: Policy, dtype: torch.dtype) -> Run:
    """All of it as one program; where that is too long, one program for the observation and one for a step."""
    if not isinstance(policy, DenoisingPolicy) or _length(policy) <= LONGEST_PROGRAM:
        return _program(_eager(policy, dtype), policy)
    policy = copy.deepcopy(policy)
    for method in ("features", "_a_hat"):
        setattr(policy, method, _program(getattr(policy, method), policy))
    return _eager(policy, dtype)


def _length(policy: DenoisingPolicy) -> int:
    """Layers that a chunk goes through."""
    layers = sum(not list(module.children()) for module in policy.network.modules())
    return layers * (len(policy.grid) - 1)


def _program(function: Callable[..., Tensor], policy: Policy) -> Callable[..., Tensor]:
    on_gpu = _device(policy).type == "cuda"

    # Torch keeps what it compiles with the code, and counts it there: every engine has a code of its own.
    def run(*args: Any) -> Tensor:
        return function(*args)

    run.__code__ = run.__code__.replace()
    # CUDA graphs replay a program as one launch; on a CPU it is Python's part between the kernels that goes.
    # Nothing but the engine holds the policy, so only what is given needs a look before each call.
    options: dict[str, Any] = {
        "guard_filter_fn": torch.compiler.keep_tensor_guards_unsafe,
        "triton.cudagraphs" if on_gpu else "cpp_wrapper": True,
    }
    compiled: Callable[..., Tensor] = torch.compile(run, fullgraph=True, dynamic=False, options=options)
    # What CUDA graphs return is overwritten by the next call.
    return (lambda *args: compiled(*args).clone()) if on_gpu else compiled


ENGINES: dict[str, Maker] = {"eager": _eager, "compiled": _compiled}


@final
class _Trial:
    """Inputs to measure candidates with."""

    def __init__(self, policy: Policy, batch: int) -> None:
        self._policy, self.device = policy, _device(policy)
        generator = torch.Generator().manual_seed(0)
        self.obs = likely_observations(policy, batch, generator)
        self.noise = draw(policy, batch, None, generator)
        self._scale = policy.normalizer.scale(ACTION)

    def measure(self, candidate: Candidate, make: Callable[[], Run], tolerance: float) -> tuple[Candidate, Run]:
        """Build a candidate, compare it with the policy, and time it."""
        try:
            run = make()
            error = (self(run) - self(_eager(self._policy, torch.float32))).mul(self._scale).abs().max().item()
        except Exception as failure:  # each compiler that torch drives fails in its own way
            inner = getattr(failure, "inner_exception", failure)
            reason = (str(inner).strip().splitlines() or ["no reason given"])[0]
            return replace(candidate, refused=f"{type(inner).__name__}: {reason}"), _refused
        if not error <= tolerance:
            refused = f"its error of {error:.2g} is above the tolerance of {tolerance:g}"
            return replace(candidate, error=error, refused=refused), _refused
        return replace(candidate, chunk_ms=self.chunk_ms(run), error=error), run

    def __call__(self, run: Run) -> Tensor:
        return run(self.obs, *self.noise)

    def chunk_ms(self, run: Run, repeats: int = REPEATS) -> float:
        """Median milliseconds of a chunk."""
        taken = [timed(partial(self, run), self.device)[1] for _ in range(repeats + 3)]
        return 1e3 * sorted(taken[3:])[repeats // 2]


def likely_observations(policy: Policy, batch: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Observations {key: [B, To, ...]} to try a policy with: normal in network units, images of random bytes."""

    def of(key: str, array: ArraySpec) -> Tensor:
        shape = (batch, policy.spec.observation_steps, *array.shape)
        if array.dtype == "uint8":
            return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8).to(_device(policy))
        return policy.normalizer.unnormalize(key, torch.randn(shape, generator=generator).to(_device(policy)))

    return {key: of(key, array) for key, array in policy.spec.observations.items()}


def frozen_copy(policy: Policy, steps: int | None) -> Policy:
    """A copy that is not trained any more, with K = `steps` where given.

    Raises:
        PolicyError: the policy does not denoise, or not at the times that they lead to.
    """
    frozen = copy.deepcopy(policy).eval().requires_grad_(False)
    if steps is not None:
        if not isinstance(frozen, DenoisingPolicy):
            raise PolicyError(f"steps={steps}: a {type(policy).__name__} does not denoise, leave steps out")
        frozen.set_steps(steps)
    return frozen


def _best_start(forms: Mapping[str, Form], data: _Trial) -> tuple[str, int]:
    """The form and the number of CPU threads with which a policy runs fastest, as it is.

    A processor may be faster with matrix products for short convolutions, and with one thread for small products. Of
    those that differ by less than a measurement does, it is the first: Python's part hides what compiling brings out.
    """
    most = torch.get_num_threads()
    counts = sorted({1, 2, most // 2, most} & set(range(1, most + 1))) if data.device.type == "cpu" else [most]
    starts = list(product(forms, counts))
    times = []
    for form, threads in starts:
        with _threads(threads):
            times.append(data.chunk_ms(_eager(*forms[form]), REPEATS // 6))
    return next(start for start, time in zip(starts, times, strict=True) if time <= 1.1 * min(times))


def _fastest(built: Sequence[tuple[Candidate, Run]]) -> tuple[Candidate, Run]:
    usable = [(candidate.chunk_ms, n) for n, (candidate, _) in enumerate(built) if candidate.chunk_ms is not None]
    if not usable:
        reasons = "; ".join(f"{each.name} {each.dtype} {each.form}: {each.refused}" for each, _ in built)
        raise PolicyError(f"no engine can be built: {reasons}")
    return built[min(usable)[1]]


def _refused(obs: dict[str, Tensor], noise: Tensor, later: Tensor) -> Tensor:
    raise AssertionError("what was refused is never chosen")


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    if count != before:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        if count != before:
            torch.set_num_threads(before)


def _ordinary(tensor: Tensor) -> Tensor:
    return tensor.clone() if tensor.is_inference() else tensor


def _device(policy: Policy) -> Any:
    return next(policy.buffers()).device
