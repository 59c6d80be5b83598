"""Print what made a job fail: the rank that was killed, else the one whose exception came first.

    python slurm/first_error.py LOGS

LOGS has, for each node, torchrun's output (node0.log) and a folder with each rank's output and, after an exception, its
error.json. Other errors are mostly those of ranks that lost their peer. Needs nothing but Python.
"""

import json
import re
import sys
from pathlib import Path

KILLED = re.compile(r"traceback : (Signal \d+ \((?!SIGTERM)\w+\)[^\n]*)")
"""A process that a signal ended, in torchrun's summary; SIGTERM is torchrun's own, for those that were left."""


def main(logs: Path) -> None:
    texts = {path: path.read_text(errors="replace") for path in sorted(logs.glob("node*.log"))}
    killed = [(path, found[1]) for path, text in texts.items() if (found := KILLED.search(text))]
    errors = sorted(map(read_error, logs.glob("node*/**/error.json")))
    if killed:
        path, signal = killed[0]
        print(
            f"killed first: a process of {path.stem}: {signal}\nSIGKILL is mostly the kernel's, for memory. See {path}"
        )
    elif errors:
        _, message, folder = errors[0]
        print(f"failed first: {place(folder)}\n{message}\nits output: {folder}/stderr.log")
    else:
        for path, text in texts.items():
            print(f"failed: {path}", *text.splitlines()[-15:], sep="\n")


def read_error(path: Path) -> tuple[int, str, Path]:
    """Time in seconds, message with traceback, folder of the rank."""
    message = json.loads(path.read_text())["message"]
    if isinstance(message, str):
        return int(path.stat().st_mtime), message, path.parent
    extra = message["extraInfo"]
    return int(extra["timestamp"]), f"{message['message']}\n{extra['py_callstack']}", path.parent


def place(folder: Path) -> str:
    node = next(part for part in folder.parts[::-1] if part.startswith("node"))
    return f"{node}, process {folder.name} of it"


if __name__ == "__main__":
    main(Path(sys.argv[1]))
