"""`python -m paretune` is the command line, where the program `paretune` isn't on the path."""

from __future__ import annotations

import os
import sys

if __name__ == "__main__":
    # Unlike the program `paretune`, `-m` puts the working directory before all else: a file there, e.g. a user's own
    # `ray.py`, would stand in for a package. What a job imports is on its python_path. PYTHONSAFEPATH would do, but
    # Python 3.10 doesn't know it, and all that is started from here would inherit it.
    if sys.path[0] == os.getcwd():  # noqa: PTH109 - pathlib isn't loaded yet, and could be a file there as well
        del sys.path[0]

    from paretune.cli import main

    main()
