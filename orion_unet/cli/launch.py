"""torchrun, with the exit code of the rank that failed first instead of a traceback of its own.

``python -m orion_unet.cli.launch`` takes torchrun's own arguments.
"""

from __future__ import annotations

import argparse
import logging
import math
import os
import signal
import sys

from orion_unet.cli.arguments import EXIT_FAILURE, parse_train_config, run_command
from orion_unet.config import RuntimeOptions
from orion_unet.errors import InputError


def launch(argv: list[str]) -> int:
    """Run torch's elastic launcher with torchrun's arguments; returns 0, or the exit code that ended the run."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args
    from torch.distributed.run import run as run_elastic

    from orion_unet.distributed import usable_cores

    arguments = parse_args(argv)
    if hasattr(arguments, "signals_to_handle"):
        # SIGUSR1, the early warning of a scheduler, is passed on to the ranks like the others. Under nohup, SIGHUP is
        # to be ignored.
        hangup = [] if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else ["SIGHUP"]
        arguments.signals_to_handle = ",".join(["SIGTERM", "SIGINT", "SIGQUIT", "SIGUSR1", *hangup])
    _wait_for_ranks(arguments, stop_timeout(arguments.training_script_args))
    ranks = int(arguments.nproc_per_node) if str(arguments.nproc_per_node).isdecimal() else 1
    # torchrun would give each rank a single thread; CPU ranks share the machine's cores instead.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, usable_cores() // max(1, ranks))))
    # The rank that fails says why; the launcher's own log would bury that message.
    for name in list(logging.root.manager.loggerDict):
        if name.startswith("torch.distributed.elastic"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        run_elastic(arguments)
    except ChildFailedError as error:
        _, first = error.get_first_failure()
        # If a rank was killed, that is the cause, even if another rank, having lost it, ended within the same second.
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


def stop_timeout(words: list[str]) -> float:
    """``--stop_timeout_s`` of a training command's words, or its default where they are not a training command's."""
    try:
        return parse_train_config(words[1:] if words[:1] == ["train"] else words).runtime.stop_timeout_s
    except (InputError, SystemExit):
        # The ranks report what is wrong.
        return RuntimeOptions.stop_timeout_s


def _wait_for_ranks(arguments: argparse.Namespace, seconds: float) -> None:
    """Let the elastic launcher wait so long between asking its ranks to stop and killing them; its own 30 seconds may
    end within a save."""
    if hasattr(arguments, "shutdown_timeout"):
        arguments.shutdown_timeout = math.ceil(seconds)
    else:
        # Before torch 2.10 or so there is no such argument, but the default of this method.
        from torch.distributed.elastic.multiprocessing.api import PContext

        PContext.close.__defaults__ = (None, math.ceil(seconds))


def main(argv: list[str]) -> int:
    """The command line of ``python -m orion_unet.cli.launch``."""
    if not argv:
        raise InputError("python -m orion_unet.cli.launch takes torchrun's arguments, then a script and its options")
    return launch(argv)


if __name__ == "__main__":
    sys.exit(run_command(main))
