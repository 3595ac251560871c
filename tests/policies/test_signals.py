import os
import signal

import pytest

from flowsteer.policies.signals import StopRequest


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_answered_at_once_and_the_second_acts_as_ever(number, capfd):
    before = signal.signal(number, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), number)
            assert stop.requested
            told = capfd.readouterr().err.strip()
            assert told == "stopping: what has begun is finished, then saved; once more to stop at once"
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), number)
    finally:
        signal.signal(number, before)


def test_several_processes_ignore_what_their_launcher_repeats(capfd):
    with StopRequest(patient=True) as stop:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested
        assert "once more" not in capfd.readouterr().err
