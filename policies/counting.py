"""How often a policy asks its network: the cost of a decision that no other load of the machine changes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, final

from torch import nn

from flowsteer.policies.policy import Policy


@final
@dataclass
class NetworkCounter:
    """evaluations: of the network, each row of a batch counted; None for a family without a network of that name."""

    evaluations: int | None


@contextmanager
def counting(policy: Policy) -> Iterator[NetworkCounter]:
    """Count within the context; what torch.compile has made of the policy is not seen."""
    network = getattr(policy, "network", None)
    counter = NetworkCounter(0 if isinstance(network, nn.Module) else None)

    def count(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        assert counter.evaluations is not None
        counter.evaluations += len(inputs[0])

    hook = network.register_forward_hook(count) if isinstance(network, nn.Module) else None
    try:
        yield counter
    finally:
        if hook is not None:
            hook.remove()
