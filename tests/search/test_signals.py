"""SIGTERM as an exception."""

from __future__ import annotations

import os
import signal

import pytest

from paretune.search.signals import sigterm_raises


def test_the_first_sigterm_raises_and_further_ones_leave_the_cleaning_up_alone() -> None:
    before = signal.getsignal(signal.SIGTERM)
    cleaned = False
    with pytest.raises(SystemExit) as ended, sigterm_raises():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)
            cleaned = True
    assert (ended.value.code, cleaned) == (143, True)
    assert signal.getsignal(signal.SIGTERM) is before
