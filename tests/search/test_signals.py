"""SIGTERM as an exception, in a process of its own: the tests' one has run whatever native libraries do to signals."""

from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import os, signal, sys
from paretune.search.signals import sigterm_raises

before = signal.getsignal(signal.SIGTERM)
try:
    with sigterm_raises():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)
            print("cleaned")
finally:
    print("restored" if signal.getsignal(signal.SIGTERM) is before else "changed")
"""


def test_the_first_sigterm_raises_and_further_ones_leave_the_cleaning_up_alone() -> None:
    ended = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=60, check=False)
    assert (ended.returncode, ended.stdout.split()) == (143, ["cleaned", "restored"]), ended.stderr
