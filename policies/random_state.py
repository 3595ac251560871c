"""The state of every random number generator as plain JSON values and tensors."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from torch import Tensor


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch (all devices)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def pack_random() -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The global generators: values for JSON, tensors for safetensors."""
    version, internal, gauss = random.getstate()
    legacy = np.random.get_state(legacy=False)
    assert isinstance(legacy, dict)
    values = {
        "python": [version, list(internal), gauss],
        "numpy": {
            "pos": int(legacy["state"]["pos"]),
            "has_gauss": int(legacy["has_gauss"]),
            "gauss": float(legacy["gauss"]),
        },
    }
    tensors = {"random.torch": torch.get_rng_state(), "random.numpy": torch.from_numpy(legacy["state"]["key"].copy())}
    if torch.cuda.is_available():
        tensors["random.cuda"] = torch.cuda.get_rng_state()
    return values, tensors


def unpack_random(values: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Inverse of `pack_random`."""
    version, internal, gauss = values["python"]
    random.setstate((version, tuple(internal), gauss))
    key = tensors["random.numpy"].numpy()
    numpy = values["numpy"]
    np.random.set_state(
        {
            "bit_generator": "MT19937",
            "state": {"key": key, "pos": numpy["pos"]},
            "has_gauss": numpy["has_gauss"],
            "gauss": numpy["gauss"],
        }
    )
    torch.set_rng_state(tensors["random.torch"])
    if torch.cuda.is_available() and "random.cuda" in tensors:
        torch.cuda.set_rng_state(tensors["random.cuda"])
