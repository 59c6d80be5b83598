"""The paper's Table 1 in miniature: all arms, paired by seed, through the command line; docs/table1.md.

    python -m benchmarks.table1 --tune                 choose learning rates, on seeds of their own
    python -m benchmarks.table1 [--seeds 10]           run what is not complete, then write the document
    python -m benchmarks.table1 --report               only write the document, from the run folders

Stopped (Ctrl-C, SIGTERM) and started again, it goes on. On another machine it goes on with `--known`, the file of runs
that a report writes: these are not run again.
"""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path

from benchmarks.table1 import tuning
from benchmarks.table1.arms import arms
from benchmarks.table1.results import read_results, read_runs
from benchmarks.table1.sweep import FULL, SMOKE, Job, Size, Sweep, not_known, sweep_jobs
from megatron_vapo.errors import INTERRUPTED_EXIT_CODE, TrainingError, UserError


def main() -> int:
    options = _parse()
    signal.signal(signal.SIGTERM, lambda *_: _interrupt())
    try:
        return _tune(options) if options.tune else _table(options)
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        return INTERRUPTED_EXIT_CODE
    except UserError as error:
        print(error, file=sys.stderr)
        return error.exit_code


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10, help="seeds 0 to SEEDS - 1")
    parser.add_argument("--arms", nargs="+", metavar="ARM", help="recipes of recipes/table1; default: all")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one core each")
    parser.add_argument("--out", type=Path, default=Path("artifacts/table1"), help="folder of all runs")
    parser.add_argument("--document", type=Path, default=Path("docs/table1.md"), help="document, its JSON and figures")
    parser.add_argument("--known", type=Path, metavar="FILE", help="runs.jsonl of a report: not run, but reported")
    parser.add_argument("--tune", action="store_true", help="choose learning rates, then stop")
    parser.add_argument("--untuned", action="store_true", help="take the learning rates of the recipes")
    parser.add_argument("--report", action="store_true", help="run nothing, write the document")
    parser.add_argument("--smoke", action="store_true", help="a few steps of a few-step base, learning rates untuned")
    return parser.parse_args()


def _tune(options: argparse.Namespace) -> int:
    families = {arm.family for arm in arms(options.arms)}
    found = tuning.read_found()
    jobs = tuning.tuning_jobs(options.out, families, found)
    failed = _run(options, jobs)
    tuning.add(found, jobs)
    tuning.write_found(found)
    for name, family in found.items():
        print(f"{name}: {family['learning_rate']} of {family['finals']}")
    return _verdict(failed)


def _table(options: argparse.Namespace) -> int:
    chosen = arms(options.arms)
    rates = {} if options.smoke or options.untuned or options.report else tuning.read_rates(chosen)
    seeds = range(options.seeds)
    known = read_runs(options.known) if options.known else []
    jobs = list(sweep_jobs(options.out, chosen, seeds, rates))
    failed = [] if options.report else _run(options, not_known(jobs, known, _size(options)))
    from benchmarks.table1.document import write_document  # matplotlib and scipy: not before they are needed

    results = read_results(options.out, [arm.name for arm in chosen], seeds, known)
    write_document(options.document, results, chosen, seeds)
    return _verdict(failed)


def _run(options: argparse.Namespace, jobs: list[Job]) -> list[str]:
    return Sweep(options.out, _size(options), options.jobs).run(jobs)


def _size(options: argparse.Namespace) -> Size:
    return SMOKE if options.smoke else FULL


def _verdict(failed: list[str]) -> int:
    if failed:
        print("\n".join(["FAILED:", *failed]))
    return TrainingError.exit_code if failed else 0


def _interrupt() -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
