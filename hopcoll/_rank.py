"""The program of one rank under `hopcoll run`: runs the user's script and marks its end.

Ranks execute this file by its path, so nothing of hopcoll or MPI is loaded before the script asks
for it.
"""

from __future__ import annotations

import atexit
import os
import runpy
import signal
import sys
from typing import NoReturn

#: What a rank writes to its stderr when the interpreter ends, with whatever exit code. One write
#: that is shorter than PIPE_BUF arrives in one piece.
END_MARK = b"\x1ehopcoll-end\n"
#: ... and when it begins; as long as the other.
BEGIN_MARK = b"\x1ehopcoll-run\n"


def main() -> None:
    """Run ``script.py arg ...`` or ``-m module arg ...`` as Python itself would."""
    if os.environ.get("HOPCOLL_LAUNCHER"):
        os.write(2, BEGIN_MARK)
        mark_end()
    package = os.path.dirname(os.path.abspath(__file__))
    # From a checkout that is not installed, the program still finds hopcoll.
    if os.path.dirname(package) not in sys.path:
        sys.path.append(os.path.dirname(package))
    del sys.argv[0]
    if sys.argv[0] == "-m":
        del sys.argv[0]
        sys.path[0] = os.getcwd()
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        sys.path[0] = os.path.dirname(os.path.abspath(sys.argv[0]))
        runpy.run_path(sys.argv[0], run_name="__main__")


def mark_end() -> None:
    """Have the end of this process, and of no child that it forks, marked on its stderr."""
    # The program may point its stderr elsewhere later. What is registered first is called last,
    # so the mark comes after MPI's own end.
    stderr = os.dup(2)
    rank = os.getpid()

    def write() -> None:
        if os.getpid() == rank:
            os.write(stderr, END_MARK)

    atexit.register(write)
    exit_at_once = os._exit

    def leave(status: int) -> NoReturn:
        """``os._exit`` passes atexit by.  With another code than 0 mpirun would tell nobody, and
        never end: a rank that others still count on dies by a signal instead, which all see."""
        if os.getpid() == rank:
            life = sys.modules.get("hopcoll._life")
            if status == 0:
                os.write(stderr, END_MARK)
            elif life is not None and life.is_open():
                os.kill(rank, signal.SIGKILL)
        exit_at_once(status)

    os._exit = leave


if __name__ == "__main__":
    main()
