"""Linear layers for few rows on a CPU: weights laid out as few_rows.cpp reads them, in float32 or bfloat16."""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import subprocess
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Lock
from typing import final

import torch
from torch import Tensor, nn
from torch.nn import functional

from flowsteer.policies.errors import PolicyError

WIDTH = 16
"""Outputs of a panel, as few_rows.cpp has it."""
SOURCE = Path(__file__).with_suffix(".cpp")
FLAGS = ("-O3", "-march=native", "-std=c++20", "-shared", "-fPIC", "-fopenmp")


@final
class PackedLinear(nn.Module):
    """An `nn.Linear` that does not learn: outputs in panels of `WIDTH`, whose weights for one input stand together.

    Args:
        linear: whose weights it takes.
        dtype: float32, or bfloat16, which halves what has to be read; inputs, sums and outputs stay float32.

    Raises:
        PolicyError: there is no C++ compiler that can build the product.
    """

    def __init__(self, linear: nn.Linear, dtype: torch.dtype) -> None:
        super().__init__()
        load_product()
        self.outputs = linear.out_features
        missing = -self.outputs % WIDTH
        weight = functional.pad(linear.weight.detach(), (0, 0, 0, missing))
        panels = weight.reshape(-1, WIDTH, linear.in_features).transpose(1, 2).to(dtype)
        if dtype == torch.bfloat16:
            # A pair of neighbours is read as one word; it is of the left and the right half of the panel.
            panels = panels.reshape(-1, linear.in_features, 2, WIDTH // 2).transpose(2, 3).flatten(2)
        bias = torch.zeros(self.outputs) if linear.bias is None else linear.bias.detach()
        self.register_buffer("panels", panels.contiguous())
        self.register_buffer("bias", functional.pad(bias, (0, missing)))

    panels: Tensor
    bias: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """[..., inputs] -> [..., outputs]."""
        out: Tensor = torch.ops.flowsteer.few_rows(x, self.panels, self.bias, self.outputs)
        return out


def with_packed_weights(module: nn.Module, dtype: torch.dtype) -> None:
    """Put a `PackedLinear` in the place of each `nn.Linear` in `module`."""
    for name, child in module.named_children():
        if type(child) is nn.Linear:
            setattr(module, name, PackedLinear(child, dtype))
        else:
            with_packed_weights(child, dtype)


def load_product() -> None:
    """Make the operator of few_rows.cpp known; where this machine has not compiled it yet, that takes 10 seconds.

    Raises:
        PolicyError: it cannot be compiled or loaded here.
    """
    with LOCK:
        if "flowsteer::few_rows" not in LOADED:
            library = _library()
            try:
                torch.ops.load_library(str(library))  # type: ignore[no-untyped-call]
            except OSError as error:
                raise PolicyError(f"{library} cannot be loaded ({error}): delete it") from None
            torch.library.register_fake("flowsteer::few_rows", _shape)
            LOADED.add("flowsteer::few_rows")


LOCK = Lock()
LOADED: set[str] = set()


def _shape(x: Tensor, panels: Tensor, bias: Tensor, outputs: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], outputs)


def _library() -> Path:
    compiler, source = os.environ.get("CXX") or "c++", SOURCE.read_text()
    digest = hashlib.sha256(repr((source, compiler, *FLAGS, torch.__version__, _processor())).encode()).hexdigest()
    cache_home = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    library = cache_home / "flowsteer" / f"few_rows-{digest[:16]}.so"
    if library.exists():
        return library
    try:
        library.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=library.parent) as scratch:
            made = Path(scratch) / library.name
            _compile(compiler, made)
            with made.open("rb") as file:
                os.fsync(file.fileno())
            made.replace(library)
    except OSError as error:
        raise PolicyError(f"{library} cannot be made ({error}): set XDG_CACHE_HOME to a folder to write to") from None
    return library


def _processor() -> list[str]:
    """What -march=native may depend on: a cache may be seen by machines with other processors."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return [platform.processor(), platform.node()]
    return sorted({line for line in lines if line.startswith(("flags", "Features", "model name", "CPU part"))})


def _compile(compiler: str, library: Path) -> None:
    # Not at the top: it brings setuptools.
    from torch.utils.cpp_extension import include_paths, library_paths

    torch_itself = [*(f"-I{folder}" for folder in include_paths()), *(f"-L{folder}" for folder in library_paths())]
    command = [*shlex.split(compiler), *FLAGS, str(SOURCE), "-o", str(library), *torch_itself, "-ltorch_cpu", "-lc10"]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, env={**os.environ, "LC_ALL": "C"})
    except (FileNotFoundError, PermissionError):
        raise PolicyError(f"there is no C++ compiler '{compiler}': install g++, or name one in CXX") from None
    except subprocess.CalledProcessError as failure:
        first = next((line for line in failure.stderr.splitlines() if "error" in line), "no reason given")
        message = f"'{compiler}' cannot compile {SOURCE.name}, name another compiler in CXX: {first}"
        raise PolicyError(message) from None
