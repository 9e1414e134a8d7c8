"""A learning-rate range test on the user's own data, with the model, loss, optimiser and batches of a training.

Smith, Cyclical learning rates for training neural networks, WACV 2017: the rate grows from step to step, and the loss
shows which rates train.
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from orion_unet.command_options import FindRateOptions
from orion_unet.config import TrainConfig
from orion_unet.data.transforms import Batch
from orion_unet.errors import InputError, RunError
from orion_unet.run_log import SCHEMA, utc_now, write_atomic, write_json
from orion_unet.training import run_folder
from orion_unet.training.build import Feeds, Run, build_run, settled
from orion_unet.training.console import Console
from orion_unet.training.devices import choose_device, keep_freed_memory, set_determinism
from orion_unet.training.engine import TrainSums, train_steps
from orion_unet.training.failures import plain_failure
from orion_unet.training.optim import automatic_rate
from orion_unet.training.prepare import planned_steps, prepare_data
from orion_unet.training.rate_range import GROWN, Suggestion, half_window, has_grown, smooth, suggest
from orion_unet.training.transfer import find_encoder, find_source

RESULT_FILE, FIGURE_FILE = "find_rate.json", "find_rate.png"
GREY, BLUE, RED = "#b0b0b0", "#4c78a8", "#e45756"


@dataclass(frozen=True)
class Sweep:
    """The finite losses of a test at growing rates, as many each, and why it ended before the highest rate: "grown",
    "not_finite" or None. ``diverged`` is the rate at which it did."""

    rates: list[float]
    losses: list[float]
    stopped: str | None
    diverged: float | None


def find_rate(config: TrainConfig, options: FindRateOptions) -> Suggestion:
    """Run the test, write find_rate.json and find_rate.png to output_dir, and print what they say.

    Deterministic by the seed as a training is. Raises InputError for bad options or data before anything is written,
    and RunError where memory or disk fail.
    """
    _check(config, options)
    # The given rate is what is looked for; the lowest one only has to be valid until the first step sets its own.
    config = TrainConfig.from_options({**config.options(), "learning_rate": options.lowest_rate}, config.recipe)
    device = choose_device(config.runtime)
    set_determinism(config.runtime.deterministic)
    keep_freed_memory(device)
    console = Console()
    source, encoder = find_source(config, None), find_encoder(config, None)
    prepared = prepare_data(config, 1, None, source, console.progress)
    config = settled(config, prepared, None, source)
    rates = np.geomspace(options.lowest_rate, options.highest_rate, options.steps).tolist()
    try:
        run = build_run(config, device, prepared, None, source, encoder)
        try:
            made = sweep(run, rates, console.progress(len(rates), "finding a rate"))
        finally:
            run.feeds.close()
    except torch.OutOfMemoryError as error:
        raise plain_failure(error, config) or error from error
    half = half_window(options.steps)
    found = suggest(made.rates, made.losses, half, made.diverged)
    automatic = automatic_rate(planned_steps(config, prepared))
    output = Path(config.output.output_dir)
    _write(output, config, options, made, found, automatic)
    console.say(_summary(output, config, options, made, found, automatic))
    return found


def _check(config: TrainConfig, options: FindRateOptions) -> None:
    output = Path(config.output.output_dir)
    if "RANK" in os.environ:
        raise InputError("find-rate runs as one process: start it without a launcher of ranks")
    if config.runtime.gpus is not None and config.runtime.gpus > 1:
        raise InputError(
            f"--gpus {config.runtime.gpus}: find-rate uses one device; give 1 or 0, and --batch_size x GPUs as "
            "--batch_size"
        )
    if config.runtime.resume:
        raise InputError(f"--resume {config.runtime.resume}: find-rate always starts with fresh weights; leave it out")
    if options.lowest_rate >= options.highest_rate:
        raise InputError(
            f"--lowest_rate {options.lowest_rate:g} is not below --highest_rate {options.highest_rate:g}: lower it"
        )
    run_folder.check_writable(output)
    if run_folder.holds_run(output):
        raise InputError(f"--output_dir {output}: holds a training run; give find-rate another folder")
    earlier = next((output / name for name in (RESULT_FILE, FIGURE_FILE) if (output / name).exists()), None)
    if earlier is not None and not config.output.overwrite:
        raise InputError(f"--output_dir {output}: has a {earlier.name}; give another folder, or --overwrite")


def sweep(run: Run, rates: list[float], progress: Callable[[], None]) -> Sweep:
    """Train the run with one optimiser step at each rate; ends early where the loss has grown or is not finite.

    The loss of a rate is that of its batches before the step. A scaled gradient that overflows in float16 ends
    nothing: the step is skipped, as in training.
    """
    accumulate, seed = run.config.optimisation.accumulate_steps, run.config.optimisation.seed
    half = half_window(len(rates))
    seeds = [hash((seed, 1, step, 0)) for step in range(len(rates) * accumulate)]
    losses: list[float] = []
    window: list[float] = []
    with closing(_batches(run.feeds, len(seeds))) as batches:
        for done in train_steps(
            run.state.learner,
            batches,
            run.loss,
            TrainSums.start(run.loss, run.device),
            [rate for rate in rates for _ in range(accumulate)],
            seeds=seeds if run.config.model.dropout > 0 else None,
        ):
            rate = rates[done.step // accumulate]
            if not math.isfinite(done.loss) or (done.bad and not done.overflow):
                return Sweep(rates[: len(losses)], losses, "not_finite", rate)
            window.append(done.loss)
            if len(window) < accumulate:
                continue
            losses.append(math.fsum(window) / accumulate)
            window.clear()
            progress()
            if has_grown(losses, half):
                return Sweep(rates[: len(losses)], losses, "grown", rate)
    return Sweep(rates, losses, None, None)


def _batches(feeds: Feeds, count: int) -> Generator[Batch, None, None]:
    """So many training batches, over as many epochs as they take."""
    epoch = 0
    while count > 0:
        epoch += 1
        feeds.order.set_epoch(epoch)
        for batch in feeds.train:
            yield batch
            count -= 1
            if count == 0:
                return


def _write(
    output: Path, config: TrainConfig, options: FindRateOptions, made: Sweep, found: Suggestion, automatic: float
) -> None:
    smoothed = _smoothed(made, options)
    document: dict[str, Any] = {
        "schema": SCHEMA,
        "created": utc_now(),
        "suggestion": asdict(found),
        "automatic_learning_rate": automatic,
        "stopped": made.stopped,
        "diverged_rate": made.diverged,
        "rates": made.rates,
        "losses": made.losses,
        "smoothed": smoothed,
        "test": asdict(options),
        "recipe": config.recipe,
        "options": {name: value for name, value in config.options().items() if name != "learning_rate"},
    }
    figure = draw(made, smoothed, found, automatic)
    try:
        output.mkdir(parents=True, exist_ok=True)
        write_atomic(output / FIGURE_FILE, figure)
        write_json(output / RESULT_FILE, document)
    except OSError as error:
        raise RunError(f"--output_dir {output}: cannot be written ({error.strerror or error})") from None


def _smoothed(made: Sweep, options: FindRateOptions) -> list[float]:
    return smooth(made.rates, made.losses, half_window(options.steps))[0].tolist()


def draw(made: Sweep, smoothed: list[float], found: Suggestion, automatic: float) -> bytes:
    """Loss against rate on a logarithmic axis, with the suggestion marked; a PNG."""
    figure = Figure(figsize=(8, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.set_xscale("log")
    axes.plot(made.rates, made.losses, ".", color=GREY, markersize=4, label="loss of a step")
    axes.plot(made.rates, smoothed, color=BLUE, linewidth=2, label="smoothed")
    if found.rate is not None:
        axes.axvline(found.rate, color=RED, label=f"steepest descent: {found.rate:.2g}")
    if found.tenth_of_diverged is not None:
        axes.axvline(
            found.tenth_of_diverged, color=RED, linestyle=":",
            label=f"a tenth of where it diverged: {found.tenth_of_diverged:.2g}",
        )  # fmt: skip
    axes.axvline(automatic, color="black", linestyle="--", linewidth=1, label=f"--learning_rate auto: {automatic:.2g}")
    if len(made.losses) > 1:
        # What comes after the divergence would flatten everything before it.
        low, high = min(made.losses), max(made.losses[: len(made.losses) // 2 + 1])
        axes.set_ylim(low - 0.05 * (high - low), high + 0.35 * (high - low))
    axes.set_xlabel("learning rate")
    axes.set_ylabel("training loss")
    axes.set_title("Loss while the learning rate grows" if found.rate is not None else "No rate can be suggested")
    axes.legend(frameon=False)
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=110)
    return drawn.getvalue()


def _summary(
    output: Path, config: TrainConfig, options: FindRateOptions, made: Sweep, found: Suggestion, automatic: float
) -> str:
    lines = [
        f"tried           {len(made.losses)} of {options.steps} steps, from a rate of {options.lowest_rate:.2g} on"
    ]
    if made.stopped == "grown":
        lines.append(f"stopped         at {made.diverged:.2g}: the loss had grown to {GROWN:g} times its lowest")
    elif made.stopped == "not_finite":
        lines.append(f"stopped         at {made.diverged:.2g}: the loss or its gradient was not finite")
    if found.rate is None:
        lines.append(f"no suggestion   {found.reason}")
    else:
        lines.append(f"suggested       {found.rate:.2g}, where the smoothed loss fell most steeply")
        lines.append(f"lowest loss     at {found.lowest_rate:.2g}" + (", still falling" if found.still_falling else ""))
    if found.tenth_of_diverged is not None:
        lines.append(f"for comparison  {found.tenth_of_diverged:.2g}, a tenth of the rate at which the loss diverged")
    lines.append(f"for comparison  {automatic:.2g}, --learning_rate auto for --epochs {config.optimisation.epochs}")
    lines.append(f"written to      {output / RESULT_FILE}, {FIGURE_FILE}")
    if found.still_falling:
        lines.append("note: the loss was lowest at the highest rate tried; raise --highest_rate to see further")
    if found.rate is not None:
        lines.append(f"--learning_rate {found.rate:.2g}")
    return "\n".join(lines)
