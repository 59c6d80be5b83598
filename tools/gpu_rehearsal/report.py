"""A rehearsal's findings as a document's table.

python -m tools.gpu_rehearsal.report FINDINGS.jsonl DOCUMENT.md     replaces the table in the document
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

from megatron_vapo.runtime.durable import write_text

BEGIN, END = "<!-- findings -->\n", "<!-- end of findings -->\n"
LONGEST = 240


def table(findings: list[dict[str, str]]) -> str:
    """Return findings, those that are not PASS first in their group."""
    lines = ["| group | what | result | told |", "|---|---|---|---|"]
    order = list(dict.fromkeys(finding["group"] for finding in findings))
    for finding in sorted(findings, key=lambda f: (order.index(f["group"]), f["status"] == "PASS")):
        told = re.sub(r"\s+", " ", finding["told"]).replace("|", "\\|").replace(str(Path.home()), "~")[:LONGEST]
        lines.append(f"| {finding['group']} | {finding['what']} | {finding['status']} | {told} |")
    return "\n".join(lines) + "\n"


def main(findings: Path, document: Path) -> None:
    found = [json.loads(line) for line in findings.read_text().splitlines()]
    before, _, rest = document.read_text().partition(BEGIN)
    write_text(document, before + BEGIN + table(found) + END + rest.partition(END)[2])


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
