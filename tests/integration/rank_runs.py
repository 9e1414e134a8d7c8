"""One rank of several runs after each other in one process, which is faster than a process for each.

``python rank_runs.py RUNS.json`` takes a list of {"port", "options", "stop_at"}: the port of that run's process group,
the options of the trainer, and the step of the epoch after which rank 0 is sent SIGTERM, or null. It prints the exit
codes as JSON.
"""

import json
import os
import signal
import sys
from pathlib import Path

import torch

from orion_unet.cli.arguments import end_process
from orion_unet.config import TrainConfig
from orion_unet.training.loop import Loop, train

PROGRESS = Loop._progress


def main(path):
    torch.set_num_threads(1)
    codes = []
    for run in json.loads(Path(path).read_text()):
        os.environ["MASTER_PORT"] = str(run["port"])

        def progress(self, stop_at=run["stop_at"], **fields):
            PROGRESS(self, **fields)
            if os.environ["RANK"] == "0" and fields.get("step", 0) == stop_at:
                os.kill(os.getpid(), signal.SIGTERM)

        Loop._progress = progress
        codes.append(train(TrainConfig.from_options(run["options"])))
    sys.stderr.write(json.dumps(codes))


if __name__ == "__main__":
    main(sys.argv[1])
    end_process(0)
