"""torchrun, with the exit code of the rank that failed first instead of a traceback of its own.

``python -m orion_unet.cli.launch`` takes torchrun's own arguments.
"""

from __future__ import annotations

import logging
import os
import signal
import sys

from orion_unet.cli.arguments import EXIT_FAILURE, run_command
from orion_unet.distributed import usable_cores
from orion_unet.errors import InputError


def launch(argv: list[str]) -> int:
    """Run torch's elastic launcher with torchrun's arguments; returns 0, or the exit code that ended the run."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args
    from torch.distributed.run import run as run_elastic

    arguments = parse_args(argv)
    if hasattr(arguments, "signals_to_handle"):
        # SIGUSR1, the early warning of a scheduler, is passed on to the ranks like the others.
        arguments.signals_to_handle = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
    ranks = int(arguments.nproc_per_node) if str(arguments.nproc_per_node).isdecimal() else 1
    # torchrun would give each rank a single thread; CPU ranks share the machine's cores instead.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, usable_cores() // max(1, ranks))))
    # The rank that fails says why; the launcher's own log of it would bury that.
    for name in list(logging.root.manager.loggerDict):
        if name.startswith("torch.distributed.elastic"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        run_elastic(arguments)
    except ChildFailedError as error:
        _, first = error.get_first_failure()
        # A rank that was killed is the cause, even where another, having lost it, ended within the same second.
        killed = (failure for failure in error.failures.values() if failure.exitcode < 0)
        first = next(killed, first)
        if first.exitcode < 0:
            name = signal.Signals(-first.exitcode).name
            hint = " (out of memory?)" if name == "SIGKILL" else ""
            print(f"error: rank {first.local_rank} of this machine was ended by {name}{hint}", file=sys.stderr)
            return EXIT_FAILURE
        return first.exitcode
    except SignalException as error:
        return 130 if error.sigval == signal.SIGINT else 143
    return 0


def main(argv: list[str]) -> int:
    """The command line of ``python -m orion_unet.cli.launch``."""
    if not argv:
        raise InputError("python -m orion_unet.cli.launch takes torchrun's arguments, then a script and its options")
    return launch(argv)


if __name__ == "__main__":
    sys.exit(run_command(main))
