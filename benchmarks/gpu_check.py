"""Everything that only a GPU can show, in one command for a machine with one of them: minutes, without a network.

    python -m benchmarks.gpu_check [--json gpu_check.json] [--seconds 540]      (make gpu-check)

Each part passes, fails (with the first line of its error; the others go on) or is not available (with the reason).
The results go to a JSON file and, where a GPU ran something, to docs/verified-on-gpu.md. Without a GPU it runs to its
end in about a minute: what a CPU can run is run. Exit code 0 when nothing failed.

Parts run in a process of their own that writes down each result: after a failure on a GPU, which may have broken its
context, or a death, another process goes on behind it.
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

ROOT = Path(__file__).resolve().parents[1]
DOCUMENT = ROOT / "docs" / "verified-on-gpu.md"

PARTS = {
    "versions": "gpu_machine:versions",
    "Transformer Engine": "gpu_machine:transformer_engine",
    "matmul peak": "gpu_machine:matmul_peak",
    "bfloat16 against float32": "gpu_parts:bfloat16_model",
    "FP8 against float32": "gpu_parts:fp8_model",
    "log-prob kernels against float64": "gpu_parts:logprob_kernels",
    "GAE and losses against float64": "gpu_parts:gae_and_losses",
    "offload round trip": "gpu_parts:offload_round_trip",
    "tiny updates": "gpu_runs:tiny_updates",
    "updates at 1.5B": "gpu_runs:updates_1_5b",
    "memory against the plan": "gpu_runs:memory_against_plan",
    "rollouts": "gpu_runs:rollouts",
    "deterministic mode twice": "gpu_runs:determinism",
}
"""Name of each part, in the order in which they run, and its function in this package."""


@dataclass(frozen=True)
class Result:
    part: str
    status: Literal["pass", "fail", "not available"]
    reason: str = ""
    numbers: dict[str, float | str] = field(default_factory=dict)
    seconds: float = 0.0


def check(seconds: float) -> list[Result]:
    """All parts, one after another, within so many seconds; those that come too late are not available."""
    deadline = time.monotonic() + seconds
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as scratch:
        folder = Path(scratch)
        results: list[Result] = []
        while len(results) < len(PARTS):
            problem = _work(folder, deadline)
            results = _read(folder)
            if problem is not None:
                _note(folder, Result(list(PARTS)[len(results)], *problem))
                results = _read(folder)
    return results


def _work(folder: Path, deadline: float) -> tuple[str, str] | None:
    """One process behind those before it; what to note of the part that it did not come through, if there is one."""
    left = deadline - time.monotonic()
    if left <= 0:
        return "not available", "no time was left"
    worker = subprocess.Popen([sys.executable, "-m", "benchmarks.gpu_check", "--worker", str(folder)], cwd=ROOT)
    try:
        code = worker.wait(timeout=left)
    except subprocess.TimeoutExpired:
        worker.kill()
        worker.wait()
        return "fail", "not done when the time was over"
    return None if code == 0 else ("fail", f"its process ended with code {code}")


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


def document(results: list[Result], when: str, commit: str) -> str:
    """docs/verified-on-gpu.md."""
    device = results[0].numbers.get("device", "unknown")
    return f"""# Verified on a GPU

{device}; {when}; commit {commit}; `make gpu-check`.

{table(results)}
"""


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


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True).stdout.strip() or "unknown"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=Path("gpu_check.json"), help="file for the results")
    parser.add_argument("--seconds", type=float, default=540, help="for everything")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        warnings.filterwarnings("ignore")
        work(options.worker)
        return 0
    results = check(options.seconds)
    when, commit = str(datetime.date.today()), _git("describe", "--always", "--dirty")
    content = {"date": when, "commit": commit, "results": [asdict(result) for result in results]}
    options.json.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    print(table(results))
    if results[0].numbers.get("device", "CPU") != "CPU":
        DOCUMENT.write_text(document(results, when, commit), encoding="utf-8")
    return int(any(result.status == "fail" for result in results))


if __name__ == "__main__":
    sys.exit(main())
