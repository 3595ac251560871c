"""float32 or bfloat16, by measurement: with AMX a CPU multiplies bfloat16 about 7 times faster, without it slower."""

from __future__ import annotations

import time

import torch

from flowsteer.policies.choices import pick

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def choose_dtype(precision: str, device: torch.device) -> torch.dtype:
    """The dtype of autocast for "auto", "float32" or "bfloat16"."""
    if precision != "auto":
        return pick(DTYPES, precision, "train.precision")
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    float32_s, bfloat16_s = (_matmul_s(dtype) for dtype in (torch.float32, torch.bfloat16))
    # Casts and norms stay in float32, so a small gain in the products is a loss in the whole.
    return torch.bfloat16 if bfloat16_s < 0.7 * float32_s else torch.float32


def _matmul_s(dtype: torch.dtype, size: int = 256, repeats: int = 5) -> float:
    """Fastest of a few products of two square matrices."""
    a, b = torch.ones(2, size, size, dtype=dtype).unbind()
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        a @ b
        times.append(time.perf_counter() - started)
    return min(times)
