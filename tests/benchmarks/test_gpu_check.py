"""`make gpu-check` on a machine without a GPU: it runs to its end, and fails only what fails."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_check, gpu_machine, gpu_parts
from benchmarks.gpu_check import PARTS, Result, check, document, run_part

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: make gpu-check")
def test_it_runs_to_its_end_without_a_gpu(tmp_path: Path) -> None:
    before = gpu_check.DOCUMENT.read_text()
    command = [sys.executable, "-m", "benchmarks.gpu_check", "--partial", "--json", str(tmp_path / "results.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    results = {result["part"]: result for result in json.loads((tmp_path / "results.json").read_text())["results"]}
    assert list(results) == list(PARTS)
    assert done.returncode == 0, results
    not_here = {name for name, result in results.items() if result["status"] == "not available"}
    needs = {"Transformer Engine", "matmul peak", "FP8 against float32", "updates at 1.5B", "separate placement"}
    assert not_here == needs
    assert all("CUDA" in results[name]["reason"] for name in not_here)
    assert {result["status"] for name, result in results.items() if name not in not_here} == {"pass"}
    assert gpu_check.DOCUMENT.read_text() == before


def test_a_failure_is_told_in_its_first_line_and_nothing_else_is_kept_from_running(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_: gpu_machine.Workplace) -> gpu_machine.Numbers:
        raise RuntimeError("CUDA error: an illegal memory access\nmore of it")

    monkeypatch.setattr(gpu_parts, "gae_and_losses", broken)
    result = run_part("GAE and losses against float64", tmp_path)
    assert (result.status, result.reason) == ("fail", "RuntimeError: CUDA error: an illegal memory access")
    assert run_part("log-prob kernels against float64", tmp_path).status == "pass"


@pytest.fixture
def workers(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Result]]:
    """`workers(*scripts)` -> what `check` makes of processes that run these, one after another."""
    start = subprocess.Popen

    def run(*scripts: str) -> list[Result]:
        left = iter(scripts)

        def worker(command: list[str], cwd: Path) -> subprocess.Popen[bytes]:
            head = (
                "import json, os, sys; note = lambda part, status='pass': print(json.dumps({'part': part, "
                f"'status': status}}), flush=True, file=open({command[-1] + '/results.jsonl'!r}, 'a'))"
            )
            return start([sys.executable, "-c", f"{head}; {next(left)}"])

        monkeypatch.setattr(gpu_check.subprocess, "Popen", worker)
        results = check(seconds=60)
        assert [result.part for result in results] == list(PARTS)
        assert next(left, None) is None
        return results

    return run


DIES = f"os.kill(os.getpid(), {signal.SIGKILL.value})"


def noting(parts: list[str]) -> str:
    return "; ".join(f"note({name!r})" for name in parts)


def test_a_process_that_dies_is_the_failure_of_its_part_alone(workers: Callable[..., list[Result]]) -> None:
    """The second part kills the first process; the second process does all that come after it."""
    results = workers(f"note('versions'); {DIES}", noting(list(PARTS)[2:]))
    assert [result.status for result in results] == ["pass", "fail"] + ["pass"] * (len(PARTS) - 2)
    assert "-9" in results[1].reason


def test_a_process_that_dies_after_a_failure_that_it_noted_is_not_the_next_part_s(
    workers: Callable[..., list[Result]],
) -> None:
    results = workers(f"note('versions', 'fail'); {DIES}", noting(list(PARTS)[1:]))
    assert [result.status for result in results] == ["fail"] + ["pass"] * (len(PARTS) - 1)


@pytest.mark.parametrize("status", ["pass", "fail"])
def test_a_process_that_dies_after_the_last_part_changes_nothing(
    status: str, workers: Callable[..., list[Result]]
) -> None:
    results = workers(f"{noting(list(PARTS)[:-1])}; note({list(PARTS)[-1]!r}, {status!r}); {DIES}")
    assert [result.status for result in results] == ["pass"] * (len(PARTS) - 1) + [status]


def test_what_comes_too_late_is_not_available() -> None:
    start = time.monotonic()
    results = check(seconds=0)
    assert time.monotonic() - start < 5
    assert {(result.status, result.reason) for result in results} == {("not available", "no time was left")}


def test_numbers_are_compared_and_not_only_shown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    original = gpu_parts.fused_logprob_and_entropy

    def wrong(*arguments: object) -> tuple[torch.Tensor, torch.Tensor]:
        logprobs, entropy = original(*arguments)
        return logprobs, entropy * 1.001

    monkeypatch.setattr(gpu_parts, "fused_logprob_and_entropy", wrong)
    result = run_part("log-prob kernels against float64", tmp_path)
    assert result.status == "fail" and "fused" in result.reason


def test_the_document_says_what_was_run_with_what_and_keeps_what_is_left() -> None:
    results = [Result("versions", "pass", numbers={"device": "H200"}), Result("a | b", "fail", "broken")]
    text = document(results, "2026-01-01", "abc", ["SGLang"])
    assert "H200; 2026-01-01; commit abc" in text and "| **fail** |" in text and "Without SGLang" in text
    assert text.endswith(gpu_check.unproven())
    kept = ("several nodes", "\n## What reading found before any run\n", "Slurm's signals")
    assert all(what in text for what in kept)


@pytest.mark.parametrize("missing", [["Transformer Engine"], ["Transformer Engine", "SGLang"]])
def test_an_environment_that_lacks_the_gpu_path_is_refused(
    missing: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_check, "absent", lambda: missing)
    monkeypatch.setattr(sys, "argv", ["gpu_check"])
    assert gpu_check.main() == 9
    said = capsys.readouterr().err
    assert all(name in said for name in (*missing, "docs/install.md", "--partial"))


def test_what_is_cut_leaves_a_report_of_what_came_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of a GPU, and the worker ends."""
    monkeypatch.setattr(gpu_check, "DOCUMENT", tmp_path / "verified.md")
    (tmp_path / "verified.md").write_text("## What remains unproven\n\nseveral nodes\n")
    start, workers = subprocess.Popen, []
    first = {"part": "versions", "status": "pass", "numbers": {"device": "H200"}}

    def worker(command: list[str], cwd: Path) -> subprocess.Popen[bytes]:
        Path(command[-1], "results.jsonl").write_text(json.dumps(first) + "\n")
        workers.append(start(["sleep", "600"]))
        return workers[-1]

    def report(results: list[Result]) -> None:
        gpu_check.write_report(results, tmp_path / "results.json", missing=[])
        raise SystemExit  # as SIGTERM does

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(gpu_check.subprocess, "Popen", worker)
        patch.setattr(gpu_check, "_git", lambda *_: "abc")
        check(seconds=60, report=report)
    assert workers[0].poll() is not None
    results = json.loads((tmp_path / "results.json").read_text())["results"]
    assert [result["part"] for result in results] == list(PARTS)
    assert {result["reason"] for result in results[1:]} == {"not reached"}
    assert "H200" in (tmp_path / "verified.md").read_text()


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: make gpu-check")
def test_what_only_a_gpu_runs_has_run_with_stand_ins(tmp_path: Path) -> None:
    """All lines but CUDA's. Two kinds of layers among them: Transformer Engine's have other parameters in another
    order, and by order a sound model's gradients had a cosine of 0.74 with those of Megatron's layers."""
    environment = os.environ | {
        "PYTHONPATH": f"{ROOT}:{ROOT / 'tests' / 'models' / 'stand_ins'}",
        "OMP_NUM_THREADS": "1",
        "TRITON_INTERPRET": "1",
    }
    command = [sys.executable, ROOT / "tests" / "benchmarks" / "gpu_stand_ins.py", tmp_path]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-2000:]
    told = json.loads((tmp_path / "results.json").read_text())["results"]
    by_cpu = ("GAE and losses against float64", "tiny updates", "deterministic mode twice")
    numbers = {result["part"]: result["numbers"] for result in told if result["part"] not in by_cpu}
    assert list(numbers) == [name for name in PARTS if name not in by_cpu]
    problems = {result["part"]: result["reason"] for result in told if result["status"] != "pass"}
    assert not problems.keys() - {*by_cpu}, problems
    assert "triton" in numbers["log-prob kernels against float64"]
    fp8 = ("delayed", "tensorwise", "blockwise")
    assert numbers["FP8 against float32"].keys() >= {f"{recipe}: gradient cosine" for recipe in fp8}
    assert numbers["rollouts"]["engine"] == "SGLang"
    assert numbers["updates at 1.5B"].keys() >= {"peak, GB", "MFU, of the measured peak"}
    memory = numbers["memory against the plan"]
    assert memory.pop("of") == "updates at 1.5B" and len(memory) == 5  # phases
    document = (tmp_path / "verified.md").read_text()
    assert document.startswith("# Verified on a GPU\n\nstand-in") and document.endswith("several nodes\n")
