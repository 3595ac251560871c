"""JSON files that are whole or absent."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from flowsteer.sim.files import replacing


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
