"""One rank of a job. A run that stopped with a checkpoint must be no failure to torchrun, which would kill the ranks
that still write theirs; job.sh sees the mark and requeues the job."""

import os
import sys
from pathlib import Path

from megatron_vapo.cli import main
from megatron_vapo.errors import INTERRUPTED_EXIT_CODE

if __name__ == "__main__":
    code = main(sys.argv[1:])
    if code == INTERRUPTED_EXIT_CODE:
        Path(os.environ["VAPO_LOGS"], "interrupted").touch()
        code = 0
    sys.exit(code)
