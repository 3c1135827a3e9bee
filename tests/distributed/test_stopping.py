"""Signals only set a flag; what was there before comes back."""

import contextlib
import os
import signal

import pytest

from spire_dist.distributed.stopping import STOP_SIGNALS, StopFlag


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_is_noted_and_nothing_is_interrupted(number):
    with StopFlag() as stop:
        assert stop.requested is None
        os.kill(os.getpid(), number)
        assert stop.requested == number


def test_a_second_ctrl_c_interrupts_at_once():
    with StopFlag() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested == signal.SIGTERM
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_the_old_handlers_come_back_even_after_an_error():
    before = [signal.getsignal(number) for number in STOP_SIGNALS]
    with contextlib.suppress(ZeroDivisionError), StopFlag():
        assert all(signal.getsignal(number) not in before for number in STOP_SIGNALS)
        raise ZeroDivisionError
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == before
