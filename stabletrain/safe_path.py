"""Whether Python imports from the current folder. Nothing is imported here that is not loaded at Python's start.

A file called ``queue.py`` or ``yaml.py`` in the folder where a command is run must not replace an installed module.
"""

import os
import sys


def leave_out_current_folder() -> None:
    """Remove the current folder, which ``python -m`` puts first, from the places of imports."""
    if not sys.flags.safe_path and sys.path and os.path.abspath(sys.path[0]) == os.getcwd():
        del sys.path[0]


def append_current_folder() -> None:
    """Import from the current folder, too, but only what is found nowhere else."""
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
