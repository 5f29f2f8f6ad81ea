"""Runs this exported model with paretune, which has the runtime that its card names.

    python run.py            checks that it answers the recorded probe as it did when it was measured; --exactly
                             allows no difference, as on the machine that measured it

or `from run import session; outputs = session().run(inputs)` with a dictionary of arrays of one batch.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from paretune.objectives.artifact import load_probe, load_session, probe_difference
from paretune.objectives.runtimes import Session

HERE = Path(__file__).resolve().parent
TOLERANCE = 0.02
"""Other processors may round otherwise: largest difference that passes, as a share of the largest output."""


def session() -> Session:
    """The model, loaded as it was loaded to be measured."""
    return load_session(HERE)


if __name__ == "__main__":
    difference = probe_difference(HERE)
    largest = float(np.abs(load_probe(HERE)[1]).max())
    good = difference == 0 or (sys.argv[1:] != ["--exactly"] and difference <= TOLERANCE * largest)
    print(f"{'ok' if good else 'WRONG'}: the outputs differ by up to {difference:.3g} from the recorded ones")
    sys.exit(0 if good else 1)
