"""Rewards of one's own: functions in any module that Python finds (docs/add_a_reward.md).

    PYTHONPATH=. megatron-vapo train recipes/gsm8k_0.5b.yaml name=last_number \
        reward.name=examples.my_reward:last_number

Nothing is registered and nothing else is edited. A recipe is refused before any model is built where the module or the
function does not exist, or takes other parameters. Rewards run in processes of their own, each response within
`reward.timeout_seconds`: one on which the function raises, hangs or dies counts as wrong, and the run goes on.
"""

from __future__ import annotations

import asyncio
import re
import sys

from megatron_vapo.rewards import RewardInput


def last_number(response: str, answer: str) -> float:
    """Return +1.0 if the last number of the response equals the answer's, else -1.0.

    A response that hit its length limit is not passed here: it is wrong already.

    >>> last_number("3 + 4 = 7, so it is 7.0", "7")
    1.0
    >>> last_number("I do not know", "7")
    -1.0
    """
    numbers = re.findall(r"-?\d+(?:\.\d+)?", response)
    return 1.0 if numbers and float(numbers[-1]) == float(answer) else -1.0


def within_budget(sample: RewardInput) -> dict[str, float]:
    """Return 0 for a response of at most `budget` tokens, a column of the data, else -1; and the share that it used."""
    budget = float(str(sample.row.get("budget", 1000)))
    fits = sample.finish_reason == "stop" and sample.response_tokens <= budget
    return {"score": 0.0 if fits else -1.0, "used": sample.response_tokens / budget}


async def passes_its_tests(sample: RewardInput) -> float:
    """Return +1.0 if the response, a Python program, runs with the row's `tests` after it, else -1.0.

    A real one runs it in a sandbox: the text of a policy may do anything.
    """
    program = sample.response + "\n" + str(sample.row["tests"])
    process = await asyncio.create_subprocess_exec(sys.executable, "-I", "-c", program)
    try:
        return 1.0 if await process.wait() == 0 else -1.0
    finally:
        if process.returncode is None:  # the time is over
            process.kill()
