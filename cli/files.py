"""JSON files that are whole or absent, paths that mean the same everywhere, and the folders of results."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from flowsteer.datasets.minari_hdf5 import SCHEME
from flowsteer.sim.files import replacing


def absolute(path: str, folder: Path) -> str:
    """`path`, relative ones from `folder`; `minari:ID` names no file and stays."""
    return path if path.startswith(SCHEME) else os.path.normpath(folder / Path(path).expanduser())


def write_json(file: Path, value: Any) -> None:
    """Write indented JSON; NaN and infinity, which JSON lacks, become null."""
    text = json.dumps(_finite(value), indent=2, allow_nan=False) + "\n"
    with replacing(file) as temporary:
        temporary.write_text(text)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def result_folder(checkpoint: Path, kind: str, name: str) -> Path:
    """RUN/KIND-NAME for the results of a checkpoint; of another than the last, its own name comes between."""
    if (checkpoint / "checkpoints").is_dir():
        return checkpoint / f"{kind}-{name}"
    run = checkpoint.parent.parent if checkpoint.parent.name == "checkpoints" else checkpoint.parent
    return run / f"{kind}-{checkpoint.name}-{name}"
