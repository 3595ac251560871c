"""A policy as one ONNX file: normaliser, encoder and the whole denoising loop, for any runtime that knows no Python."""

from __future__ import annotations

import importlib
import json
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from flowsteer.policies.denoising import DenoisingPolicy
from flowsteer.policies.errors import PolicyError
from flowsteer.policies.freezing import draw, frozen_copy, likely_observations
from flowsteer.policies.policy import ACTION, Policy
from flowsteer.policies.samplers import Drawn

NOISE, STEP_NOISE = "noise", "step_noise"
TOLERANCE = 1e-4
"""Largest error of the file in onnxruntime against PyTorch, in normalised units."""
TRIALS = 3


def export_onnx(policy: Policy, file: Path, batch: int = 1, steps: int | None = None) -> float:
    """Write `file`, which appears only if onnxruntime makes the same actions of it as PyTorch.

    Its inputs are the observations [B, To, ...] in physical units under their own names, "noise" [B, Tp, Da] (standard
    normal), and where the sampler is stochastic "step_noise" [K, B, Tp, Da]; its output is "action" [B, Ta, Da] in
    physical units. The policy's spec is in the file's metadata, as JSON under "spec".

    Args:
        policy: on the CPU.
        file: where to write; its folder exists.
        batch: B.
        steps: K, denoising steps; the policy's own where not given.

    Returns:
        The largest error in normalised units.

    Raises:
        PolicyError: an option is out of its range, a package is missing, ONNX lacks an operator of the policy, or the
            file does not compute the same.
    """
    if batch < 1:
        raise PolicyError(f"batch must be at least 1, got {batch}")
    frozen = frozen_copy(policy, steps)
    if frozen.differentiates:
        raise PolicyError(
            f"{type(frozen).__name__} takes gradients, for which ONNX has no operator: "
            "export a diffusion or flow policy"
        )
    if isinstance(frozen, DenoisingPolicy):
        frozen.freeze_times()
    taken = {NOISE, STEP_NOISE, ACTION} & set(frozen.spec.observations)
    if taken:
        raise PolicyError(f"observation '{min(taken)}' has the name of another input or output of the file: rename it")
    onnx = _package("onnx")
    for package in ("onnxscript", "onnxruntime"):
        _package(package)
    temporary = file.with_name(f".{file.stem}.{os.getpid()}{file.suffix}")
    try:
        model = _translated(frozen, batch)
        onnx.helper.set_model_props(model, {"spec": json.dumps(frozen.spec.to_dict())})
        onnx.save(model, temporary)
        error = _error(frozen, batch, temporary)
        if not error <= TOLERANCE:
            raise PolicyError(f"{file} is not written: its error of {error:.2g} is above the {TOLERANCE:g} allowed")
        os.replace(temporary, file)
    except OSError as failure:
        reason = failure.strerror or failure
        raise PolicyError(f"{file} cannot be written ({reason}): free disk space or choose another out=") from failure
    finally:
        temporary.unlink(missing_ok=True)
    return error


@final
class _Chunk(nn.Module):
    """Executed actions of named inputs; without step noise where the sampler takes none."""

    def __init__(self, policy: Policy) -> None:
        super().__init__()
        self.policy = policy

    def forward(self, obs: dict[str, Tensor], noise: Tensor, step_noise: Tensor | None = None) -> Tensor:
        generator = None if step_noise is None else Drawn(step_noise)
        return self.policy.act(obs, noise=noise, generator=generator)


def _inputs(policy: Policy, batch: int, seed: int) -> tuple[Any, ...]:
    """Arguments of `_Chunk`."""
    generator = torch.Generator().manual_seed(seed)
    obs = likely_observations(policy, batch, generator)
    noise, later = draw(policy, batch, None, generator)
    return (obs, noise, later) if policy.noises else (obs, noise)


def _names(policy: Policy) -> list[str]:
    return [*policy.spec.observations, NOISE, *([STEP_NOISE] if policy.noises else [])]


def _translated(policy: Policy, batch: int) -> Any:
    """The ONNX model."""
    names, chunk = _names(policy), _Chunk(policy).eval()
    try:
        with _quiet():
            program = torch.onnx.export(
                chunk, _inputs(policy, batch, 0), dynamo=True, input_names=names, output_names=[ACTION], verbose=False
            )
    except Exception as error:  # each stage of the translation fails in its own way
        # The last cause is the operator or line that it stumbled over.
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        reason = (str(cause).strip().splitlines() or ["no reason given"])[0]
        raise PolicyError(f"this policy cannot be written as ONNX ({type(cause).__name__}: {reason})") from error
    assert program is not None
    return program.model_proto


def _error(policy: Policy, batch: int, file: Path) -> float:
    """Against PyTorch, in normalised units, over a few random inputs."""
    session = _package("onnxruntime").InferenceSession(str(file), providers=["CPUExecutionProvider"])
    scale = policy.normalizer.scale(ACTION).numpy()

    def error(seed: int) -> float:
        inputs = _inputs(policy, batch, seed)
        arrays: list[NDArray[Any]] = [*(inputs[0][key].numpy() for key in policy.spec.observations)]
        arrays += [value.numpy() for value in inputs[1:]]
        (actions,) = session.run([ACTION], dict(zip(_names(policy), arrays, strict=True)))
        with torch.no_grad():
            expected = _Chunk(policy)(*inputs).numpy()
        return float(np.abs((actions - expected) * scale).max())

    return max(error(seed) for seed in range(1, 1 + TRIALS))


def _package(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise PolicyError(f"{name} is missing: pip install 'flowsteer[onnx]'") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter tells of its own deprecations, and of torchvision that is not there."""
    logger = logging.getLogger("torch.onnx")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)
