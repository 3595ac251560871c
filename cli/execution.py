"""How chunks are decided on while a policy is judged: each from noise, or from the one before."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, final

from omegaconf import DictConfig

from flowsteer.cli.errors import UsageError, unknown
from flowsteer.policies.errors import PolicyError
from flowsteer.policies.policy import Policy
from flowsteer.policies.rti import RealTimeIteration, RtiOptions, denoising
from flowsteer.sim.evaluate import Executor

SYNC, RTI = "sync", "rti"
"""What `execution=` may be; the latter is also where a checkpoint's config keeps its choices {Ta: options}."""


@final
@dataclass(frozen=True)
class Execution:
    """A name, what it was told, and what decides in the policy's place; None for the policy itself."""

    name: str = SYNC
    options: Mapping[str, Any] = field(default_factory=dict)
    executor: Executor | None = None


POLICY_ITSELF = Execution()


def find_execution(config: DictConfig, policy: Policy, stored: Mapping[str, Any]) -> Execution:
    """What `config.execution` names, for a policy and the config of its checkpoint.

    Raises:
        UsageError: there is no such execution, its options are missing, or they would do nothing.
        PolicyError: the policy cannot be executed so.
    """
    if config.execution not in EXECUTIONS:
        raise unknown("execution", config.execution, EXECUTIONS)
    return EXECUTIONS[config.execution](config, policy, stored)


def execute_steps(policy: Policy, config: DictConfig) -> None:
    """Execute `config.horizon.execution_steps` of each chunk, where given.

    Raises:
        PolicyError: the chunk is shorter.
    """
    if config.horizon.execution_steps is not None:
        policy.spec = replace(policy.spec, execution_steps=config.horizon.execution_steps)


def name_of(config: DictConfig) -> str:
    """What tells the results of another execution from those of the plain one, as a part of a folder's name."""
    execution, steps = config.get("execution", SYNC), config.horizon.execution_steps
    given = (f"{name}{value}".lower() for name, value in _given(config).items())
    parts = [*([] if execution == SYNC else [execution]), *given, *([] if steps is None else [f"ta{steps}"])]
    return "".join(f"{part}-" for part in parts)


def _sync(config: DictConfig, policy: Policy, stored: Mapping[str, Any]) -> Execution:
    given = sorted(_given(config))
    if given:
        raise UsageError(f"rti.{given[0]} does nothing for execution={SYNC}: set execution={RTI} or leave it out")
    return POLICY_ITSELF


def _rti(config: DictConfig, policy: Policy, stored: Mapping[str, Any]) -> Execution:
    denoising(policy)
    steps = policy.spec.execution_steps
    options = {**_choice(config, stored, steps), **_given(config)}
    if not {"start", "steps"} <= options.keys():
        again = "" if config.horizon.execution_steps is None else f" horizon.execution_steps={steps}"
        raise UsageError(
            f"{config.checkpoint} has no choice for real-time iteration with Ta = {steps}: make it with flowsteer rti "
            f"checkpoint={config.checkpoint}{again}, or set rti.start and rti.steps"
        )
    try:
        chosen = RtiOptions(**options)
    except TypeError as error:
        raise _damaged(config, error) from error
    return Execution(RTI, asdict(chosen), RealTimeIteration(policy, chosen))


def _choice(config: DictConfig, stored: Mapping[str, Any], steps: int) -> Mapping[str, Any]:
    """What the checkpoint's config holds for Ta = `steps`, if anything."""
    choices = stored.get(RTI, {})
    choice = choices.get(steps, {}) if isinstance(choices, Mapping) else None
    if not isinstance(choice, Mapping):
        raise _damaged(config, "not a table of options")
    return choice


def _damaged(config: DictConfig, why: object) -> PolicyError:
    where = f"{config.checkpoint}: '{RTI}' in its config.yaml"
    return PolicyError(f"{where} is damaged ({why}): make it again with flowsteer rti")


def _given(config: DictConfig) -> dict[str, Any]:
    return {str(name): value for name, value in (config.get(RTI) or {}).items() if value is not None}


EXECUTIONS: dict[str, Callable[[DictConfig, Policy, Mapping[str, Any]], Execution]] = {SYNC: _sync, RTI: _rti}
