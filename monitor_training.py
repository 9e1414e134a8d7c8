#!/usr/bin/env python3
"""Watch a training run in a second terminal: python monitor_training.py --output_dir RUN [--watch]"""

import sys

from orion_unet.cli.arguments import run_command
from orion_unet.cli.monitor import main

if __name__ == "__main__":
    sys.exit(run_command(main))
