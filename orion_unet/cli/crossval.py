"""crossval: one training for every fold, then scores of every core by the model that held it out."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from types import FrameType
from typing import Any

from orion_unet.cli.arguments import EXIT_FAILURE, EXIT_OK, Parser, add_options, parse_train_config, train_parser
from orion_unet.cli.progress import progress, say
from orion_unet.command_options import CrossvalOptions, DeviceOptions
from orion_unet.config import TrainConfig
from orion_unet.errors import InputError
from orion_unet.options import checked
from orion_unet.run_log import CHECKPOINT_DIR, CONFIG_FILE, LOG_FILE, STATUS_FILE, read_document
from orion_unet.slides.remote import input_path

# What crossval gives each training itself.
OWN = ("fold", "val_split", "split_file", "output_dir", "resume", "overwrite")
SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP") if hasattr(signal, name))
PACKAGE_ROOT = Path(__file__).resolve().parents[2]


def parser() -> Parser:
    """The command line of crossval, up to the ``--`` before the options of the trainer."""
    parser = Parser(
        prog="orion_unet crossval",
        usage="orion_unet crossval --folds N --output_dir DIR [options] -- [options of the trainer]",
        description="Train once for every fold, one training after the other on every GPU, and score each core by the "
        "model that held it out.",
        epilog="The same command continues after an interruption; finished folds are skipped. With --fold K, several "
        "jobs can train the folds; the command without --fold then scores them.",
    )
    add_options(parser, CrossvalOptions)
    add_options(parser, DeviceOptions, title="scoring: where the trained models run")
    return parser


def main(argv: list[str]) -> int:
    """Run crossval. Returns the exit code, that of a fold that failed; raises InputError and RunError."""
    split = argv.index("--") if "--" in argv else len(argv)
    own, words = argv[:split], argv[split + 1 :]
    given = vars(parser().parse_args(own))
    options, where = checked(CrossvalOptions, given), checked(DeviceOptions, given)
    if options.fold is not None and options.fold > options.folds:
        raise InputError(f"--fold {options.fold}: there are --folds {options.folds}")
    if "RANK" in os.environ:
        raise InputError("crossval starts the ranks of each training itself; run it without torchrun")
    _refuse_own(words)
    configs = {number: parse_train_config(_options(words, options, number)) for number in _numbers(options)}
    unfinished = [number for number, config in configs.items() if not _finished(config)]
    for number in sorted(set(configs) - set(unfinished)):
        say(f"fold {number} of {options.folds} is finished")
    _check_panels([configs[number] for number in unfinished])
    with Trainings() as trainings:
        for number in unfinished:
            say(f"fold {number} of {options.folds}: training in {configs[number].output.output_dir}")
            code = trainings.run(_options(words, options, number))
            if trainings.received is not None:
                again = "the same command continues"
                print(f"interrupted in fold {number} of {options.folds}; {again}", file=sys.stderr, flush=True)
                return code
            if code != EXIT_OK:
                print(f"error: {_failure(number, options, code)}", file=sys.stderr, flush=True)
                return code if code > 0 else EXIT_FAILURE
    if options.fold is not None:
        say("once every fold is finished, the command without --fold scores them together")
        return EXIT_OK
    # Only now: --help should not wait for torch.
    from orion_unet.evaluation.crossval import score_folds

    runs = [_run_folder(options, number) for number in configs]
    score_folds(runs, options.output_dir, where, say, progress)
    print(f"Written to {options.output_dir}")
    return EXIT_OK


def _numbers(options: CrossvalOptions) -> range:
    return range(1, options.folds + 1) if options.fold is None else range(options.fold, options.fold + 1)


def _run_folder(options: CrossvalOptions, number: int) -> Path:
    return options.output_dir / f"fold_{number}"


def _options(words: list[str], options: CrossvalOptions, number: int) -> list[str]:
    """The options of the training of one fold."""
    run = str(_run_folder(options, number))
    return [*words, "--fold", f"{number}/{options.folds}", "--output_dir", run, "--resume", "auto"]


def _refuse_own(words: list[str]) -> None:
    """Raise InputError where the trainer's options contain one that crossval chooses itself, or cannot be used."""
    taken = [name for name in OWN if name in vars(train_parser("orion_unet crossval ... --").parse_args(words))]
    if taken:
        names = ", ".join(f"--{name}" for name in taken)
        raise InputError(f"{names}: crossval chooses this for each fold itself; leave it out behind --")


def _finished(config: TrainConfig) -> bool:
    """Whether the run of a fold has ended by itself. Raises InputError where it was made with other options."""
    run = Path(config.output.output_dir)
    try:
        stored = (read_document(run / CONFIG_FILE)[0] or {}).get("options")
        state = (read_document(run / STATUS_FILE)[0] or {}).get("state")
    except OSError:
        return False
    if not isinstance(stored, dict) or state not in ("finished", "early_stopped"):
        return False
    changes = config.changes_from(stored)
    if changes:
        raise InputError.listing(
            f"{run}: this fold is finished and was trained with other options:",
            changes,
            "Give the same options, or another --output_dir.",
        )
    best = run / CHECKPOINT_DIR / "best.pt"
    return best.exists() and int(stored.get("epochs") or 0) >= config.optimisation.epochs


def _check_panels(configs: list[TrainConfig]) -> None:
    """Raise InputError where panels differ and a fold has no training core for a marker: before any is trained."""
    # Only now: --help should not wait for NumPy and torch.
    from orion_unet.data.panels import PANELS_FILE

    if configs and (input_path(configs[0].data.pairs_dir) / PANELS_FILE).is_file():
        from orion_unet.training.prepare import check_folds

        check_folds(configs)


def _failure(number: int, options: CrossvalOptions, code: int) -> str:
    run = _run_folder(options, number)
    log = run / LOG_FILE
    ended = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    seen = f"its log is {log}" if log.exists() else "it wrote no log, its message is above"
    return f"fold {number} of {options.folds} {ended}; {seen}. The same command continues with this fold"


class Trainings:
    """Context in which trainings run one at a time and get the signals that this process receives.

    ``received`` is the first signal. Each training is a process group of its own, so that a Ctrl-C reaches it once.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._child: subprocess.Popen[bytes] | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Trainings:
        for number in SIGNALS:
            # nohup ignores SIGHUP: the trainings are to outlive their terminal, too.
            if number == signal.SIGINT or signal.getsignal(number) != signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._pass_on)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def run(self, options: list[str]) -> int:
        """Train as ``python -m orion_unet train`` does, on all ranks; returns the exit code, negative for a signal.

        After a signal to this process it is 130 for a Ctrl-C and 143 for any other, unless the training says so itself.
        """
        path = os.pathsep.join(filter(None, [str(PACKAGE_ROOT), os.environ.get("PYTHONPATH")]))
        if self.received is None:
            self._child = subprocess.Popen(
                [sys.executable, "-m", "orion_unet", "train", *options],
                env={**os.environ, "PYTHONPATH": path},
                process_group=0,
            )
            if self.received is not None:
                # It came before there was a process to pass it on to.
                self._child.send_signal(self.received)
            code = self._child.wait()
            self._child = None
        else:
            code = EXIT_OK
        if self.received is None or code in (130, 143):
            return code
        return 130 if self.received == signal.SIGINT else 143

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        self.received = self.received or number
        if self._child is not None:
            self._child.send_signal(number)
