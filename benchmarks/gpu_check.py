"""Everything that only a GPU can show, in one command for a machine with one of them: minutes, without a network.

    python -m benchmarks.gpu_check [--json gpu_check.json] [--seconds 540] [--partial]      (make gpu-check)

Each part passes, fails (with the first line of its error; the others go on) or is not available (with the reason).
The results go to a JSON file and, where a GPU ran something, to docs/verified-on-gpu.md, after each part: what is cut
leaves a report of what came before. The parts worth most come first. Without a GPU, --partial runs to its end in about
a minute: what a CPU can run is run. Exit code 0 when nothing failed.

Parts run in a process of their own that writes down each result: after a failure on a GPU, which may have broken its
context, or a death, another process goes on behind it.
"""

from __future__ import annotations

import argparse
import datetime
import json
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from megatron_vapo.errors import InstallationError

ROOT = Path(__file__).resolve().parents[1]
DOCUMENT = ROOT / "docs" / "verified-on-gpu.md"

PARTS = {
    "versions": "gpu_machine:versions",
    "Transformer Engine": "gpu_machine:transformer_engine",
    "bfloat16 against float32": "gpu_parts:bfloat16_model",
    "rollouts": "gpu_runs:rollouts",
    "log-prob kernels against float64": "gpu_parts:logprob_kernels",
    "offload round trip": "gpu_parts:offload_round_trip",
    "FP8 against float32": "gpu_parts:fp8_model",
    "GAE and losses against float64": "gpu_parts:gae_and_losses",
    "tiny updates": "gpu_runs:tiny_updates",
    "matmul peak": "gpu_machine:matmul_peak",
    "updates at 1.5B": "gpu_runs:updates_1_5b",
    "memory against the plan": "gpu_runs:memory_against_plan",
    "separate placement": "gpu_runs:separate_placement",
    "deterministic mode twice": "gpu_runs:determinism",
}
"""Name of each part, in the order in which they run, and its function in this package."""

Report = Callable[[list["Result"]], None]


@dataclass(frozen=True)
class Result:
    part: str
    status: Literal["pass", "fail", "not available"]
    reason: str = ""
    numbers: dict[str, float | str] = field(default_factory=dict)
    seconds: float = 0.0


def check(seconds: float, report: Report = lambda results: None) -> list[Result]:
    """All parts, one after another, within so many seconds; those that come too late are not available.

    `report` gets the results so far, again and again.
    """
    deadline = time.monotonic() + seconds
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as scratch:
        folder = Path(scratch)
        results: list[Result] = []
        while len(results) < len(PARTS):
            problem, known = _work(folder, deadline, report), len(results)
            results = _read(folder)
            failed = any(result.status == "fail" for result in results[known:])  # which may have broken its end too
            if problem is not None and not failed and len(results) < len(PARTS):
                _note(folder, Result(list(PARTS)[len(results)], *problem))
                results = _read(folder)
    report(results)
    return results


def _work(folder: Path, deadline: float, report: Report) -> tuple[str, str] | None:
    """One process behind those before it; what to note of the part that it did not come through, if there is one."""
    if time.monotonic() >= deadline:
        return "not available", "no time was left"
    worker = subprocess.Popen([sys.executable, "-m", "benchmarks.gpu_check", "--worker", str(folder)], cwd=ROOT)
    try:
        while worker.poll() is None:
            if time.monotonic() >= deadline:
                return "fail", "not done when the time was over"
            report(_read(folder))
            time.sleep(0.2)
    finally:
        worker.kill()  # also where this process is told to end
        worker.wait()
    return None if worker.returncode == 0 else ("fail", f"its process ended with code {worker.returncode}")


def work(folder: Path) -> None:
    """In a worker: the parts that have no result yet; after a failure on a GPU no more of them."""
    import gc

    import torch

    from megatron_vapo.runtime import cpu_backend

    cpu_backend.install()
    for name in list(PARTS)[len(_read(folder)) :]:
        print(f"{name} ...", file=sys.stderr, flush=True)
        result = run_part(name, folder)
        _note(folder, result)
        print(f"{name}: {result.status} {result.reason}", file=sys.stderr, flush=True)
        if result.status == "fail" and torch.cuda.is_available():
            break
        gc.collect()  # models hold themselves in circles
        torch.cuda.empty_cache()


def run_part(name: str, folder: Path) -> Result:
    """One part's result, whatever happens in it."""
    import importlib

    from benchmarks.gpu_machine import NotAvailable, Workplace

    passed = {result.part: result.numbers for result in _read(folder) if result.status == "pass"}
    module, function = PARTS[name].split(":")
    start = time.monotonic()
    try:
        numbers = getattr(importlib.import_module(f"benchmarks.{module}"), function)(Workplace(folder, passed))
    except NotAvailable as reason:
        return Result(name, "not available", str(reason))
    except Exception as error:  # noqa: BLE001  # whatever it is, it is this part's result, and the others go on
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        return Result(name, "fail", reason, seconds=time.monotonic() - start)
    return Result(name, "pass", numbers=numbers, seconds=time.monotonic() - start)


def _note(folder: Path, result: Result) -> None:
    with (folder / "results.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(result)) + "\n")


def _read(folder: Path) -> list[Result]:
    path = folder / "results.jsonl"
    return [Result(**json.loads(line)) for line in path.read_text().splitlines()] if path.is_file() else []


def write_report(results: list[Result], path: Path, missing: list[str]) -> None:
    """Write the JSON file and, of a GPU, the document: results so far, and parts that were not reached."""
    reached = {result.part for result in results}
    results = results + [Result(part, "not available", "not reached") for part in PARTS if part not in reached]
    when, commit = str(datetime.date.today()), _git("describe", "--always", "--dirty")
    content = {"date": when, "commit": commit, "missing": missing, "results": [asdict(result) for result in results]}
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    if results[0].numbers.get("device", "CPU") != "CPU":
        DOCUMENT.write_text(document(results, when, commit, missing), encoding="utf-8")


def document(results: list[Result], when: str, commit: str, missing: list[str]) -> str:
    """docs/verified-on-gpu.md."""
    device = results[0].numbers.get("device", "unknown")
    without = f" **Without {' and '.join(missing)}**: most of what users run was not there." if missing else ""
    return f"""# Verified on a GPU

{device}; {when}; commit {commit}; `make gpu-check`.{without}

{table(results)}

{unproven()}"""


def unproven() -> str:
    """The document's own list of what is left to show, and all that comes after it, which stays."""
    _, heading, rest = DOCUMENT.read_text(encoding="utf-8").partition("## What remains unproven")
    return heading + rest


def table(results: list[Result]) -> str:
    """Markdown."""
    lines = ["| part | result | seconds | |", "|---|---|---|---|"]
    for result in results:
        told = result.reason or ", ".join(_told(result.numbers))
        status = f"**{result.status}**" if result.status == "fail" else result.status
        lines.append(f"| {result.part} | {status} | {result.seconds:.1f} | {told.replace('|', '/')} |")
    return "\n".join(lines)


def _told(numbers: dict[str, float | str]) -> Iterator[str]:
    for name, value in numbers.items():
        yield f"{name} {value if isinstance(value, str) else f'{value:.4g}'}"


def absent() -> list[str]:
    """Return which of the two packages that a GPU node has are not here."""
    from megatron_vapo.commands.doctor import find_sglang, installed_version

    found = {"Transformer Engine": installed_version("transformer-engine"), "SGLang": find_sglang()}
    return [name for name, version in found.items() if version is None]


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True).stdout.strip() or "unknown"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=Path("gpu_check.json"), help="file for the results")
    parser.add_argument("--seconds", type=float, default=540, help="for everything")
    parser.add_argument("--partial", action="store_true", help="run though Transformer Engine or SGLang is absent")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        warnings.filterwarnings("ignore")
        work(options.worker)
        return 0
    missing = absent()
    if missing and not options.partial:
        print(
            f"gpu_check: {sys.executable} has no {' and no '.join(missing)}, without which little of the GPU path "
            "would be shown: activate the environment of docs/install.md, or say --partial",
            file=sys.stderr,
        )
        return InstallationError.exit_code
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # ends the worker too
    written: list[Result] = []

    def report(results: list[Result]) -> None:
        if results != written:
            written[:] = results
            write_report(results, options.json, missing)

    results = check(options.seconds, report)
    print(table(results))
    return int(any(result.status == "fail" for result in results))


if __name__ == "__main__":
    sys.exit(main())
