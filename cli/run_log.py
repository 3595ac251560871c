"""Where a training run's numbers go: a progress bar, metrics.jsonl, TensorBoard, plots and, on request, W&B."""

from __future__ import annotations

import json
import math
import uuid
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, final

from rich.console import Console
from torch.utils.tensorboard import SummaryWriter

from flowsteer.cli.errors import UsageError
from flowsteer.cli.plots import plot_run
from flowsteer.datasets.progress import ProgressBar
from flowsteer.sim.files import replacing, writing

METRICS = "metrics.jsonl"


class Sink(Protocol):
    """One destination."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Take the values of a step."""

    def close(self) -> None:
        """Write what is pending."""


@final
class RunLog:
    """Numbers by step, to every sink; use it as a context.

    Args:
        folder: the run folder.
        steps: the last step, for the time left.
        unit: what is counted.
        start: the step that a resumed run starts from; what was logged after it is dropped.
        wandb: keyword arguments of `wandb.init`; None keeps W&B out.
    """

    def __init__(
        self,
        folder: Path,
        steps: int,
        *,
        unit: str = "steps",
        start: int = 0,
        wandb: Mapping[str, Any] | None = None,
    ) -> None:
        self._folder, self._unit = folder, unit
        # W&B first: where its package is missing, nothing has been written and no bar has started.
        remote: list[Sink] = [] if wandb is None else [Wandb(folder, wandb)]
        local: list[Sink] = [Metrics(folder / METRICS, start), TensorBoard(folder, start), Screen(steps, unit, start)]
        self._sinks = [*remote, *local]

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Record `values` of optimiser step `step`."""
        for sink in self._sinks:
            sink.log(step, values)
        if any(name.startswith("eval/") for name in values):
            self.plot()

    def plot(self) -> None:
        """Draw the curves anew."""
        plot_run(self._folder, read_metrics(self._folder / METRICS), self._unit)

    def __enter__(self) -> RunLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with ExitStack() as stack:
            for sink in self._sinks:
                stack.callback(sink.close)
        if error is None:
            self.plot()


@final
class Silent:
    """For the processes beside the main one."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Nothing."""


@final
class Metrics:
    """One JSON object per call: {"step": ..., name: value, ...}; NaN and infinity become null."""

    def __init__(self, file: Path, start: int) -> None:
        kept = [row for row in read_metrics(file) if row["step"] <= start]
        with replacing(file) as temporary:
            temporary.write_text("".join(json.dumps(row) + "\n" for row in kept))
        self._file, self._stream = file, file.open("a", buffering=1)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Append a line."""
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        with writing(self._file):
            self._stream.write(json.dumps({"step": step, **finite}) + "\n")

    def close(self) -> None:
        """Close the file."""
        with writing(self._file):
            self._stream.close()


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """The whole lines of a metrics file, in order; none where there is no file. A line that a kill cut is left out."""
    rows = []
    for line in file.read_text().splitlines() if file.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


@final
class Screen:
    """A bar on a terminal, plain lines elsewhere; evaluations, validations and the last step leave a line."""

    def __init__(self, steps: int, unit: str, start: int) -> None:
        self._steps = steps
        console = Console(soft_wrap=True)
        self._bar = ProgressBar("training", steps, unit, start=start, first_line_s=0, console=console)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Move the bar."""
        judged = any(name.startswith(("eval/", "val/")) for name in values)
        self._bar.move(step, format_numbers(values), keep=judged or step >= self._steps)

    def close(self) -> None:
        """Take the bar away."""
        self._bar.close()


def format_numbers(values: Mapping[str, float]) -> str:
    """NAME value, with [low, high] where there is an interval."""
    texts = []
    for name, value in values.items():
        if name.endswith(("_low", "_high")):
            continue
        low, high = values.get(f"{name}_low"), values.get(f"{name}_high")
        interval = "" if low is None or high is None else f" [{low:.3g}, {high:.3g}]"
        texts.append(f"{name.removeprefix('train/').removeprefix('eval/')} {value:.4g}{interval}")
    return "  ".join(texts)


@final
class TensorBoard:
    """Event files in the run folder; `tensorboard --logdir runs` compares runs."""

    def __init__(self, folder: Path, start: int) -> None:
        self._folder = folder
        self._writer = SummaryWriter(str(folder), purge_step=start + 1 if start else None, flush_secs=10)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Add one scalar for each value."""
        with writing(self._folder):
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush and close."""
        with writing(self._folder):
            self._writer.close()


@final
class Wandb:
    """Weights & Biases; a resumed run goes on under its first id.

    Raises:
        UsageError: the package is missing.
    """

    def __init__(self, folder: Path, options: Mapping[str, Any]) -> None:
        try:
            import wandb
        except ModuleNotFoundError:
            raise UsageError("log.wandb=true needs a package: pip install 'flowsteer[wandb]'") from None
        note = folder / "wandb_id.txt"
        if not note.exists():
            with replacing(note) as temporary:
                temporary.write_text(uuid.uuid4().hex)
        self._run = wandb.init(dir=str(folder), id=note.read_text().strip(), resume="allow", **options)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Send the values."""
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        """Finish the upload."""
        self._run.finish()
