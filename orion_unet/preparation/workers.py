"""Tasks over the processes of this machine, or over the workers of a Dask cluster."""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import TypeVar

from orion_unet.distributed import usable_cores
from orion_unet.errors import InputError, RunError
from orion_unet.extras import needed
from orion_unet.text import clean

Task = TypeVar("Task", bound=tuple[object, ...])
Result = TypeVar("Result")

# How long a scheduler may take to answer [s].
CONNECT_S = 10


def over_workers(
    work: Callable[..., Result], tasks: list[Task], jobs: int | None, dask_scheduler: str | None = None
) -> Iterator[tuple[Task, Result]]:
    """Every task with ``work(*task)``, as they finish.

    ``jobs`` is the number of processes, by default one for each usable core; one job runs in this process. With the
    address of a ``dask_scheduler``, the workers of its cluster do the work instead: they import this package and see
    the files under the same paths. What ``work`` raises is raised here, and the tasks not yet begun are dropped.
    Raises InputError where no scheduler answers, RunError where the cluster loses a task.
    """
    if dask_scheduler is not None:
        yield from _over_cluster(work, tasks, dask_scheduler)
        return
    jobs = min(jobs or usable_cores(), len(tasks))
    if jobs <= 1:
        for task in tasks:
            yield task, work(*task)
        return
    # Forked processes would share torch's threads, which do not survive a fork.
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        futures = {pool.submit(work, *task): task for task in tasks}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _over_cluster(work: Callable[..., Result], tasks: list[Task], address: str) -> Iterator[tuple[Task, Result]]:
    distributed = needed("distributed", extra="cluster")
    if not tasks:
        return
    try:
        client = distributed.Client(address, timeout=CONNECT_S, set_as_default=False)
    except (OSError, ValueError) as error:
        raise InputError(
            f"--dask_scheduler {clean(address)}: no scheduler answers ({clean(str(error)) or 'timed out'}); its "
            "address has the form tcp://HOST:8786"
        ) from None
    with client:
        if not client.scheduler_info(n_workers=1)["workers"]:
            print(f"{clean(address)} has no worker yet; waiting for one", file=sys.stderr, flush=True)
        # Tasks that are alike are still done each: their result is what they write.
        futures = {client.submit(work, *task, pure=False): task for task in tasks}
        try:
            for future in distributed.as_completed(futures, loop=client.loop):
                yield futures[future], future.result()
        except (distributed.KilledWorker, distributed.client.FutureCancelledError, ModuleNotFoundError) as error:
            raise RunError(
                f"--dask_scheduler {clean(address)}: a task was lost ({clean(str(error))}); see the logs of its "
                "workers, which need this package, and memory for a region each. What is finished is kept"
            ) from error
        finally:
            client.cancel(list(futures))
