from __future__ import annotations

import signal
import subprocess
import sys
import threading

import pytest

from lavender.signals import SIGNALS, Stopped, stopping


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_noted_and_the_handlers_come_back(number):
    calls = []
    before = signal.signal(number, lambda *_: calls.append(number))
    mine = signal.getsignal(number)
    try:
        with stopping() as stop:
            assert stop.requested is None
            assert stop.named() == ""
            signal.raise_signal(number)
            assert stop.requested == number
            assert stop.named() == signal.Signals(number).name
            signal.raise_signal(number)  # a launcher hands it on, too
        assert signal.getsignal(number) is mine
        assert not calls
        with pytest.raises(ZeroDivisionError), stopping():
            raise ZeroDivisionError
        assert signal.getsignal(number) is mine
    finally:
        signal.signal(number, before)


def test_in_a_thread_nothing_changes():
    before = [signal.getsignal(number) for number in SIGNALS]
    found = []

    def work():
        with stopping() as stop:
            found.append((stop.requested, [signal.getsignal(number) for number in SIGNALS]))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [(None, before)]


STOPPED = """
import sys, time
from lavender import signals
signals.SAME_S = float(sys.argv[1])
with signals.stopping() as stop:
    print("ready", flush=True)
    while not stop.requested:
        time.sleep(0.01)
    print("noted", flush=True)
    if sys.argv[2] == "works on":
        time.sleep(600)
    raise signals.Stopped("stopped")
"""


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("then", ["ends", "works on"])
def test_the_first_signal_ends_a_process_in_its_own_time_and_the_second_at_once(number, then):
    command = [sys.executable, "-c", STOPPED, "0", then]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(number)
        assert process.stdout.readline() == b"noted\n"
        if then == "works on":
            process.send_signal(signal.SIGTERM)
        _, errors = process.communicate()
    assert process.returncode == (-signal.SIGTERM if then == "works on" else 143)
    assert errors == b""


def test_what_ends_a_process_is_no_error_of_the_work():
    end = Stopped("after step 3")
    assert not isinstance(end, Exception)  # or a loop that skips what fails would go on
    assert (end.code, str(end)) == (143, "after step 3")
