"""SGLang's server, unmodified, whose processes are forked from the first one and need not import everything again.

Runs in SGLang's environment as `python forked_sglang.py ARGUMENTS OF sglang.launch_server`.
"""

from __future__ import annotations

import multiprocessing
import runpy


def main() -> None:
    import sglang.srt.entrypoints.http_server
    import sglang.srt.managers.detokenizer_manager
    import sglang.srt.managers.scheduler  # noqa: F401

    start_method = multiprocessing.set_start_method
    multiprocessing.set_start_method = lambda _, force=False: start_method("fork", force)  # SGLang asks for spawn
    runpy.run_module("sglang.launch_server", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
