"""A clean stop: finish the step, save, leave."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import final


@final
class StopRequest:
    """Within the context the first SIGINT or SIGTERM sets `requested`; the second acts as it always does.

    Args:
        patient: ignore the second as well: a launcher of several processes repeats what the terminal sent to all.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self, patient: bool = False) -> None:
        self.requested, self._patient = False, patient

    def __enter__(self) -> StopRequest:
        # Handlers can only be set from the main thread; elsewhere the owner of that thread decides.
        self._active = threading.current_thread() is threading.main_thread()
        if self._active:
            self._previous = {number: signal.signal(number, self._handle) for number in self.SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        more = "" if self._patient else "; once more to stop at once"
        # Not print, which a signal may interrupt.
        os.write(2, f"\nstopping: what has begun is finished, then saved{more}\n".encode())
        if not self._patient:
            self._restore()

    def _restore(self) -> None:
        if self._active:
            for number, handler in self._previous.items():
                signal.signal(number, handler)
