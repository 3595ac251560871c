"""JSON that came with a data set."""

from __future__ import annotations

import json
from typing import Any

from flowsteer.datasets.errors import DataError


def parse(text: str | bytes, where: str) -> Any:
    """What `text` says.

    Raises:
        DataError: naming `where`, if it is not JSON.
    """
    try:
        return json.loads(text)
    except (ValueError, TypeError) as error:
        raise DataError(f"{where} is not JSON ({error}): copy or download the data set again") from error
