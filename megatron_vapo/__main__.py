"""Runs the command line: `python -m megatron_vapo`, as torchrun and srun start it."""

import sys

from megatron_vapo.cli import main

if __name__ == "__main__":
    sys.exit(main())
