"""What one rank does in the tests of several: trains and validates on its share of fixed batches.

``python rank_work.py FOLDER`` joins the process group of its environment and leaves what it found in a file; the
tests call the same functions in one process, for what the ranks must come to.
"""

import sys
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel

from orion_unet.cli.arguments import end_process
from orion_unet.config import OptimisationOptions
from orion_unet.data.loaders import ValidationOrder
from orion_unet.data.transforms import Batch
from orion_unet.distributed import (
    all_reduce_sum,
    any_rank,
    broadcast,
    from_main_process,
    gather,
    is_main_process,
    mean_over_ranks,
    process_group,
    rank,
    world_size,
)
from orion_unet.errors import InputError
from orion_unet.losses import CompositeLoss
from orion_unet.models.unet import SpatialUNet
from orion_unet.training.averages import RunningStatistics
from orion_unet.training.engine import Learner, Precision, Requests, TrainSums, ValidationSums, train_steps, validate
from orion_unet.training.optim import build_optimizer

CPU = torch.device("cpu")
MARKERS = ("Hoechst", "CD45", "Pan-CK")
WEIGHTS = {"mse": 0.8, "l1": 0.3, "boundary": 0.5, "focal": 0.2, "variance": 0.1, "correlation": 0.3}
GLOBAL_BATCH = 4
PATCHES = 21


def patches(seed, count):
    """Noise whose boundary masks differ much in size from patch to patch."""
    rng = torch.Generator().manual_seed(seed)
    he = torch.rand(count, 3, 32, 32, generator=rng)
    target = torch.rand(count, len(MARKERS), 32, 32, generator=rng)
    share = torch.linspace(0.02, 0.6, count)[:, None, None, None]
    boundary = torch.rand(count, 1, 32, 32, generator=rng) < share
    return Batch(he, target, boundary, torch.arange(count))


def of_two_panels(batch):
    """The same with panels that differ: marker 1 in one patch of the first half alone, marker 2 in none."""
    batch.measured = torch.zeros(len(batch.he), len(MARKERS)).bool()
    batch.measured[:, 0] = True
    batch.measured[0, 1] = True
    batch.target *= batch.measured[:, :, None, None]
    return batch


def part(batch, index):
    measured = None if batch.measured is None else batch.measured[index]
    return Batch(batch.he[index], batch.target[index], batch.boundary[index], batch.core[index], measured)


def own_share(batch):
    """The consecutive patches that the training order gives this rank."""
    size = len(batch.he) // world_size()
    return part(batch, slice(rank() * size, (rank() + 1) * size))


def build(norm):
    torch.manual_seed(0)
    model = SpatialUNet(len(MARKERS), base_features=4, depth=2, norm=norm)
    statistics = RunningStatistics(model)
    optimizer = build_optimizer(model, OptimisationOptions(learning_rate=1e-3), CPU)
    wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True) if world_size() > 1 else model
    return model, Learner(wrapped, optimizer, statistics)


def train(norm, batches, accumulate=1, stop_at=None):
    """The model, the sums and the finished steps; a stop is asked for once so many batches have been taken."""
    model, learner = build(norm)
    learner.accumulate_steps = accumulate
    loss = CompositeLoss(WEIGHTS, mean_over_ranks=mean_over_ranks if world_size() > 1 else None)
    sums, requests = TrainSums.start(loss, CPU), Requests()

    def taken():
        for index, batch in enumerate(batches):
            requests.stop = stop_at is not None and index >= stop_at
            yield batch

    steps = list(train_steps(learner, taken(), loss, sums, [1e-3] * len(batches), requests=requests))
    return model, sums, steps


def gradients(accumulate, panels=False):
    """Of one optimiser step over ``accumulate`` global batches, and the reported means."""
    whole = [patches(seed, GLOBAL_BATCH) for seed in range(accumulate)]
    batches = [own_share(of_two_panels(batch) if panels else batch) for batch in whole]
    model, sums, _ = train("group", batches, accumulate)
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    return found, sums.reduced()


def validation(batch_size, panels=False):
    """The numbers of PATCHES validation patches, this rank's share of them computed here."""
    model, *_ = build("batch")
    every = of_two_panels(patches(9, PATCHES)) if panels else patches(9, PATCHES)
    requests = ValidationOrder(PATCHES, batch_size, rank(), world_size())
    batches = [part(every, torch.from_numpy(request.indices)) for request in requests]
    loss, sums = CompositeLoss(WEIGHTS), ValidationSums(MARKERS, CPU)
    list(validate(model, batches, loss, sums, Precision()))
    found = sums.reduced(loss)
    numbers = {"loss": found.loss, "patches": found.patches, **found.terms, **found.metrics}
    for marker, values in found.per_channel.items():
        numbers |= {f"{marker} {name}": value for name, value in values.items()}
    return numbers


def nan_on_the_last_rank():
    """States before and after a step whose loss is NaN on one rank only."""
    good, bad = own_share(patches(1, GLOBAL_BATCH)), own_share(patches(2, GLOBAL_BATCH))
    if rank() == world_size() - 1:
        bad.target[0, 1, 5, 5] = torch.nan
    before, *_ = train("batch", [good])
    after, sums, steps = train("batch", [good, bad])
    return {
        "before": before.state_dict(),
        "after": after.state_dict(),
        "skipped": sums.reduced()["skipped_steps"],
        "bad": [step.bad for step in steps],
        "culprits": steps[-1].culprits,
    }


def stop_on_the_last_rank():
    """Where this rank stops when only the last one is asked to, with its third batch."""
    batches = [own_share(patches(seed, GLOBAL_BATCH)) for seed in range(8)]
    last = rank() == world_size() - 1
    *_, steps = train("batch", batches, accumulate=2, stop_at=2 if last else None)
    return steps[-1].stop, len(steps)


def averaged_statistics():
    """Running means of the first norm on this rank alone, and after averaging over ranks."""
    model, learner = build("batch")
    wrapped, statistics = learner.model, learner.statistics
    wrapped.require_forward_param_sync = False
    wrapped.broadcast_buffers = False
    wrapped(own_share(patches(3, GLOBAL_BATCH)).he)
    name = next(name for name, _ in model.named_buffers() if name.endswith("running_mean"))
    alone = dict(model.named_buffers())[name].clone()
    statistics.average_over_ranks()
    return alone, dict(model.named_buffers())[name].clone()


def shared_answers():
    """What the helpers of distributed.py say on this rank."""

    def refuse():
        raise InputError("no such folder")

    try:
        from_main_process(refuse)
        refused = ""
    except InputError as error:
        refused = str(error)
    return {
        "rank": (rank(), world_size(), is_main_process()),
        "sum": float(all_reduce_sum(torch.tensor(1.0 + rank()))),
        "any": (any_rank(rank() == world_size() - 1), any_rank(False)),
        "broadcast": broadcast({"from": rank()}),
        "gather": gather(f"rank {rank()}"),
        "computed once": from_main_process(lambda: f"by {rank()}"),
        "refused": refused,
    }


def main(folder):
    torch.set_num_threads(1)
    with process_group(CPU):
        found = {"answers": shared_answers(), "validation": {size: validation(size) for size in (1, 4)}}
        if world_size() == 2:
            found["gradients"] = {accumulate: gradients(accumulate) for accumulate in (1, 2)}
            found["panels"] = gradients(1, panels=True), validation(1, panels=True)
            found["nan"] = nan_on_the_last_rank()
            found["stop"] = stop_on_the_last_rank()
            found["statistics"] = averaged_statistics()
        torch.save(found, Path(folder) / f"rank_{rank()}.pt")


if __name__ == "__main__":
    main(sys.argv[1])
    end_process(0)
