#!/usr/bin/env python3
"""Train a spatial U-Net that predicts multiplexed immunofluorescence (ORION) from H&E. See --help."""

from orion_unet.cli.arguments import end_process, run_command
from orion_unet.cli.train import main

if __name__ == "__main__":
    end_process(run_command(main))
