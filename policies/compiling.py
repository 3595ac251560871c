"""torch.compile, refused in one line where this machine has nothing to compile with."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from flowsteer.policies.errors import PolicyError

Part = TypeVar("Part", bound=nn.Module)


def compiled(module: nn.Module, device: torch.device) -> Callable[..., Any]:
    """The forward pass of `module` through torch.compile; its weights stay in `module`, under their own names.

    Raises:
        PolicyError: this machine cannot compile for `device`, or the module is trained by second derivatives.
    """
    if any(getattr(part, "differentiates", False) for part in module.modules()):
        raise PolicyError(
            "train.compile=true: torch.compile has no second derivatives, by which this policy learns: "
            "leave it train.compile=false"
        )
    _start_anew(device)
    forward: Callable[..., Any] = torch.compile(module)
    return forward


def compile_in_place(module: nn.Module, device: torch.device) -> None:
    """Whoever calls `module` from now on, with any batch size, runs it through torch.compile; weights keep their names.

    Raises:
        PolicyError: this machine cannot compile for `device`.
    """
    _start_anew(device)
    module.compile(dynamic=True)


def uncompiled(module: Part) -> Part:
    """The same weights in modules of their own, which stay as they are when those of `module` are compiled."""
    twin = copy.copy(module)
    twin._modules = {name: child and uncompiled(child) for name, child in module._modules.items()}
    return twin


def _start_anew(device: torch.device) -> None:
    """Forget what was compiled, and compile next to nothing.

    It takes what a policy takes: a compiler, Python's headers and, on a GPU, Triton.
    """
    # What earlier runs of this process compiled counts against a limit, past which torch silently does not compile.
    torch.compiler.reset()
    try:
        torch.compile(_increment)(torch.ones(1, device=device))
    except Exception as error:  # each compiler that torch drives fails in its own way
        raise PolicyError(
            f"train.compile=true: torch.compile does not work here ({reason(error)}): install a C++ "
            f"compiler and Python's headers (apt install g++ python3-dev), or leave it train.compile=false"
        ) from error


def reason(failure: Exception) -> str:
    """Why something did not compile, in one line: the kind and the first line of what torch.compile wraps."""
    inner = getattr(failure, "inner_exception", failure)
    return f"{type(inner).__name__}: {(str(inner).strip().splitlines() or ['no reason given'])[0]}"


def _increment(x: Tensor) -> Tensor:
    return x + 1
