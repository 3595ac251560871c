"""`flowsteer export`: write a checkpoint as one ONNX file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import final

from omegaconf import DictConfig
from rich.console import Console

from flowsteer.cli.application import Application
from flowsteer.cli.checks import check_positive, find_checkpoint
from flowsteer.cli.errors import UsageError
from flowsteer.cli.refusals import Composed
from flowsteer.policies.checkpoint import load_policy, resolve
from flowsteer.policies.onnx_export import export_onnx

SUFFIX = ".onnx"


@final
@dataclass
class ExportConfig:
    """What to write.

    Attributes:
        checkpoint: a run folder (its last averaged weights), RUN/best, or a checkpoint.
        steps: denoising steps; the policy's own when not given.
        batch: observations that are answered at once.
        weights: "ema" (averaged) or "weights".
        out: the file; policy.onnx in the checkpoint's folder when not given.
    """

    checkpoint: str | None = None
    steps: int | None = None
    batch: int = 1
    weights: str = "ema"
    out: str | None = None


def run(config: DictConfig, folder: Path) -> None:
    """Write the file.

    Raises:
        UsageError, PolicyError: bad options or checkpoint, or the policy cannot be written.
    """
    checkpoint = find_checkpoint(config)
    check_positive(config, "batch", "steps")
    file = folder / (Path(config.out).name if config.out else f"policy{SUFFIX}")
    if file.suffix != SUFFIX:
        raise UsageError(f"out={file.name} is no name of an ONNX file: end it in {SUFFIX}")
    policy = load_policy(checkpoint, weights=config.weights)
    with Console().status("translating to ONNX, which takes up to minutes, and comparing with PyTorch"):
        error = export_onnx(policy, file, config.batch, config.steps)
    print(f"{file}: {file.stat().st_size / 1e6:.1f} MB, within {error:.1g} of PyTorch in normalised units")


def default_out(composed: Composed) -> Path:
    """The checkpoint's own folder."""
    return resolve(find_checkpoint(composed.config).expanduser())


main = Application(
    "export",
    "Write a checkpoint as one ONNX file: normaliser, encoder and denoising loop.",
    ExportConfig,
    run,
    default_out,
    paths=("checkpoint",),
    out_is_file=True,
)
