"""`act` for one batch size, as fast as this machine allows: what is fastest is measured when it is built, not assumed.

At batch 1 a CPU waits for the weights of each layer, so they are laid out for few rows (few_rows.py); the embeddings
of the K times and the sampler's coefficients are computed beforehand. torch.compile sees the whole chunk at once,
encoder, K steps and normaliser, and fuses what is elementwise. Of a large network it sees a step, since compiling takes
as long as the program.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import product
from typing import Any, final

import torch
from torch import Tensor

from flowsteer.policies.choices import pick
from flowsteer.policies.compiling import reason
from flowsteer.policies.denoising import DenoisingPolicy
from flowsteer.policies.errors import PolicyError
from flowsteer.policies.few_rows import with_packed_weights
from flowsteer.policies.freezing import device_of, draw, frozen_copy, likely_observations
from flowsteer.policies.policy import ACTION, Observation, Policy
from flowsteer.policies.samplers import Drawn, Generators
from flowsteer.policies.short_convolutions import with_products
from flowsteer.policies.timing import fastest_s, timed

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
TRIALS = 4
"""Inputs that an engine is compared with the policy on."""
COLD, LEAST, MOST, ENOUGH_S = 3, 10, 300, 0.5
"""Chunks of a measurement: the first ones count for nothing, short ones are repeated for half a second."""
LONGEST_PROGRAM = 700
"""Most layers in one program, those of every step counted: ten steps of the MLP have 330, of the U-Net 1,000."""


@final
@dataclass(frozen=True)
class Candidate:
    """A way to run a policy, as it was measured.

    name: of the engine.
    form: how its layers are written, see `FORMS`.
    threads: of the CPU.
    chunk_ms: least time of a chunk; None if it cannot be taken, for the reason in `refused`.
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
        chosen: the fastest of them that was asked for.
    """

    def __init__(self, batch: int, candidates: list[Candidate], chosen: Candidate, policy: Policy, run: Run) -> None:
        self.candidates, self.chosen = candidates, chosen
        self._batch, self._policy, self._run, self._device = batch, policy, run, device_of(policy)

    def __call__(self, obs: Observation, *, noise: Tensor | None = None, generator: Generators = None) -> Tensor:
        """See `Policy.act`; the same random numbers give the same actions.

        Raises:
            PolicyError: the batch is of another size, or an observation or the noise is not what the policy knows.
        """
        # In the modes that it was built in: in others it would silently be compiled anew.
        with _threads(self.chosen.threads), torch.inference_mode(False), torch.no_grad():
            known = {key: self._known(key, obs) for key in self._policy.spec.observations}
            start, later = draw(self._policy, self._batch, noise, generator)
            return self._run(known, _ordinary(start, torch.float32, self._device), later)

    def _known(self, key: str, obs: Observation) -> Tensor:
        value = self._policy.checked(key, obs)
        if len(value) != self._batch:
            raise PolicyError(
                f"this engine was built for batches of {self._batch}, observation '{key}' has {len(value)}: "
                "build another with compile_act"
            )
        image = self._policy.spec.observations[key].dtype == "uint8"
        return _ordinary(value, torch.uint8 if image else torch.float32, self._device)


def compile_act(
    policy: Policy, batch: int = 1, steps: int | None = None, dtype: str = "float32", engine: str = "fastest"
) -> Engine:
    """Build the engine of a policy; takes minutes where there is a compiler, the longer the larger the network and K.

    Training with `train.compile=true` in the same process forgets what was compiled; the next call compiles it again.

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
    engines, dtypes = pick(ENGINES, engine, "engine"), pick(DTYPES, dtype, "dtype")
    with torch.inference_mode(False), torch.no_grad():
        frozen = frozen_copy(policy, steps)
        trial = _Trial(frozen, batch)
        if isinstance(frozen, DenoisingPolicy):
            frozen.freeze_times()
        candidates = [each for kind in dtypes for each in _candidates(frozen, kind, trial, "compiled" in engines)]
    chosen = _fastest([candidate for candidate in candidates if candidate.name in engines])
    return Engine(batch, candidates, chosen, *trial.working[chosen])


ENGINES = {"eager": ("eager",), "compiled": ("compiled",), "fastest": ("eager", "compiled")}


def _candidates(policy: Policy, dtype: torch.dtype, trial: _Trial, compiling: bool) -> list[Candidate]:
    """The policy eagerly in each form and number of threads, then compiled, in the best of them that compiles."""
    on_cpu, most = trial.device.type == "cpu", torch.get_num_threads()
    counts = sorted({1, 2, most // 2, most} & set(range(1, most + 1))) if on_cpu else [most]
    forms = {name: cache(partial(FORMS[name], policy, dtype)) for name in (FORMS if on_cpu else ["plain"])}
    kind, tolerance = str(dtype).removeprefix("torch."), TOLERANCES[dtype]
    measured = [
        trial.measure(Candidate("eager", kind, form, threads), forms[form], _eager, tolerance)
        for form, threads in product(forms, counts)
    ]
    for start in _best_first(measured) if compiling else []:
        candidate = Candidate("compiled", kind, start.form, start.threads)
        measured.append(trial.measure(candidate, forms[start.form], _compiled, tolerance))
        if measured[-1].refused is None:
            break
    return measured


def _best_first(measured: Sequence[Candidate]) -> list[Candidate]:
    """One candidate of each form that works, the fastest of them first.

    Of those that differ by less than a measurement does, the first: Python's part hides what compiling brings out.
    """
    times = {candidate: candidate.chunk_ms for candidate in measured if candidate.chunk_ms is not None}
    alike = 1.1 * min(times.values(), default=0.0)
    order = sorted(times, key=lambda candidate: max(times[candidate], alike))
    best: dict[str, Candidate] = {}
    for candidate in order:
        best.setdefault(candidate.form, candidate)
    return list(best.values())


def _fastest(candidates: Sequence[Candidate]) -> Candidate:
    times = [(candidate.chunk_ms, n) for n, candidate in enumerate(candidates) if candidate.chunk_ms is not None]
    if not times:
        reasons = "; ".join(f"{each.name} {each.dtype} {each.form}: {each.refused}" for each in candidates)
        raise PolicyError(f"no engine can be built: {reasons}")
    return candidates[min(times)[1]]


def _plain(policy: Policy, dtype: torch.dtype) -> Form:
    return policy, dtype


def _products(policy: Policy, dtype: torch.dtype) -> Form:
    changed = copy.deepcopy(policy)
    if not with_products(changed):
        raise PolicyError("no layer is a short convolution, so this is the plain form")
    return changed, dtype


def _packed(policy: Policy, dtype: torch.dtype) -> Form:
    if not isinstance(policy, DenoisingPolicy):
        raise PolicyError(f"{type(policy).__name__} does not denoise")
    changed = copy.deepcopy(policy)
    with_products(changed)
    with_packed_weights(changed.network, dtype)
    return changed, torch.float32


FORMS: dict[str, Callable[[Policy, torch.dtype], Form]] = {"packed": _packed, "products": _products, "plain": _plain}
"""Of a policy on a CPU: with matrix products for short convolutions and the denoising network's weights packed for few
rows, which alone are of the dtype then; with those products only; as it is."""


def _eager(policy: Policy, dtype: torch.dtype) -> Run:
    """The policy as it is."""

    def run(obs: dict[str, Tensor], noise: Tensor, later: Tensor) -> Tensor:
        with torch.autocast(noise.device.type, dtype, enabled=dtype != torch.float32):
            return policy.act(obs, noise=noise, generator=Drawn(later)).float()

    return run


def _compiled(policy: Policy, dtype: torch.dtype) -> Run:
    """All of it as one program; where that is too long, one program for the observation and one for a step.

    Raises:
        PolicyError: the policy takes gradients until it rests, of which no program can be made.
    """
    if policy.differentiates:
        raise PolicyError(f"{type(policy).__name__} takes gradients until it rests, which no program can: engine=eager")
    if not isinstance(policy, DenoisingPolicy) or _length(policy) <= LONGEST_PROGRAM:
        return _program(_eager(policy, dtype), policy)
    policy = copy.copy(policy)
    for method in ("features", "_settled_a_hat"):
        setattr(policy, method, _program(getattr(policy, method), policy))
    return _eager(policy, dtype)


def _length(policy: DenoisingPolicy) -> int:
    """Layers that a chunk goes through."""
    layers = sum(not list(module.children()) for module in policy.network.modules())
    return layers * (len(policy.grid) - 1)


def _program(function: Callable[..., Tensor], policy: Policy) -> Callable[..., Tensor]:
    on_gpu = device_of(policy).type == "cuda"

    # Torch keeps what it compiles with the code, and counts it there: every engine has a code of its own.
    def run(*args: Any) -> Tensor:
        return function(*args)

    run.__code__ = run.__code__.replace()
    options: dict[str, Any] = {
        # Nothing but the engine holds its modules: to look at all of them before each call takes longer than a layer.
        "guard_filter_fn": torch.compiler.keep_tensor_guards_unsafe,
        # CUDA graphs replay a program as one launch; on a CPU it is Python's part between the kernels that goes.
        "triton.cudagraphs" if on_gpu else "cpp_wrapper": True,
    }
    compiled: Callable[..., Tensor] = torch.compile(run, fullgraph=True, dynamic=False, options=options)
    # What CUDA graphs return is overwritten by the next call.
    return (lambda *args: compiled(*args).clone()) if on_gpu else compiled


@final
class _Trial:
    """Inputs to measure candidates with, and what the policy makes of them.

    Attributes:
        working: the policy and how to run it, of each candidate that is not refused.
    """

    def __init__(self, policy: Policy, batch: int) -> None:
        self.device, self._scale = device_of(policy), policy.normalizer.scale(ACTION)
        generator = torch.Generator().manual_seed(0)
        self._inputs = [
            (likely_observations(policy, batch, generator), *draw(policy, batch, None, generator))
            for _ in range(TRIALS)
        ]
        exact = _eager(policy, torch.float32)
        self._expected = [exact(*inputs) for inputs in self._inputs]
        self.working: dict[Candidate, tuple[Policy, Run]] = {}

    def measure(self, candidate: Candidate, form: Callable[[], Form], make: Maker, tolerance: float) -> Candidate:
        """Build a candidate, compare it with the policy, and time it."""
        try:
            with _threads(candidate.threads):
                policy, dtype = form()
                run = make(policy, dtype)
                error = max(map(partial(self._error, run), self._inputs, self._expected))
                if not error <= tolerance:
                    refused = f"its error of {error:.2g} is above the tolerance of {tolerance:g}"
                    return replace(candidate, error=error, refused=refused)
                measured = replace(candidate, chunk_ms=self._chunk_ms(run), error=error)
        except PolicyError as failure:
            return replace(candidate, refused=str(failure))
        except Exception as failure:  # each compiler that torch drives fails in its own way
            return replace(candidate, refused=reason(failure))
        self.working[measured] = policy, run
        return measured

    def _error(self, run: Run, inputs: tuple[dict[str, Tensor], Tensor, Tensor], expected: Tensor) -> float:
        return (run(*inputs) - expected).mul(self._scale).abs().max().item()

    def _chunk_ms(self, run: Run) -> float:
        """The least milliseconds of a chunk."""
        chunk = partial(run, *self._inputs[0])
        cold = [timed(chunk, self.device)[1] for _ in range(COLD)]
        repeats = min(MOST, max(LEAST, int(ENOUGH_S / cold[-1])))
        return 1e3 * fastest_s(chunk, self.device, repeats)


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


def _ordinary(tensor: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """As a program knows it: other dtypes, layouts or gradients would have it compiled anew."""
    return tensor.detach().to(device, dtype, copy=True, memory_format=torch.contiguous_format)
