"""SGLang's server, unmodified, whose processes are forked from the first one and need not import everything again.

Runs in SGLang's environment as `python forked_sglang.py server_main.py ARGUMENTS OF sglang.launch_server`.
"""

from __future__ import annotations

import multiprocessing
import runpy
import sys


def main() -> None:
    import sglang.srt.entrypoints.http_server
    import sglang.srt.managers.detokenizer_manager
    import sglang.srt.managers.scheduler  # noqa: F401

    start_method = multiprocessing.set_start_method
    multiprocessing.set_start_method = lambda _, force=False: start_method("fork", force)  # SGLang asks for spawn
    del sys.argv[0]
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
