"""The tables of ``benchmarks/results/`` as Markdown, on the screen or between the two marks in a file.

python benchmarks/report.py
python benchmarks/report.py README.md                writes them between <!-- measured --> and <!-- /measured -->
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

from timing import RESULTS, markdown

BEGIN, END = "<!-- measured -->", "<!-- /measured -->"


def main() -> None:
    tables = report(RESULTS)
    if len(sys.argv) < 2:
        print(tables)
        return
    path = Path(sys.argv[1])
    text = path.read_text(encoding="utf-8")
    before, mark, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (mark and end):
        raise SystemExit(f"{path} has no {BEGIN} ... {END}")
    path.write_text(f"{before}{BEGIN}\n{tables}\n{END}{after}", encoding="utf-8")


def report(folder: Path) -> str:
    """Return every table that the folder's files give, with the machine they come from."""
    ratios = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("ratios-*.json"))]
    files = (path for name in ("overhead", "mechanism") for path in sorted(folder.glob(f"{name}-*.json")))
    overheads = [json.loads(path.read_text(encoding="utf-8")) for path in files]
    cards = [card_tables(path) for path in sorted(folder.glob("cuda-*.json"))]
    if not ratios and not overheads and not cards:
        return "No results yet."
    parts = [describe((ratios + overheads)[0]["machine"])] if ratios or overheads else []
    if ratios:
        columns = ("peer's time over ours", "rows", "least", "median", "most")
        parts.append(markdown(columns, [row for content in ratios for row in summary(content)]))
    for content in overheads:
        rows = [(row["what"], f"{row['figure']:.3g} {row['unit']}") for row in content["rows"]]
        threads = content["machine"]["threads"]
        parts.append(markdown((f"{content['dtype']}, {threads} thread(s)", "figure"), rows))
    return "\n\n".join(parts + cards)


def summary(content: dict[str, Any]) -> list[tuple[str, ...]]:
    """Return one line for each kind of row of a peer: full and causal, long and short."""
    lines = []
    threads = content["machine"]["threads"]
    version = content["machine"]["versions"].get(content["peer"], "")
    for causal in (False, True):
        for long in (True, False):
            found = [row["ratio"] for row in content["rows"] if row["causal"] == causal and (row["N"] >= 512) == long]
            if found:
                part = {"backward": "backward, ", "both": "forward and backward, "}.get(content.get("what", ""), "")
                kind = f"{part}{'causal' if causal else 'full'}, {'M >= 512' if long else 'M < 512'}"
                what = f"{content['peer']} {version}, {content['dtype']}, {threads} thread(s), {kind}"
                numbers = (f"{pick(found):.2f}" for pick in (min, statistics.median, max))
                lines.append((what, str(len(found)), *numbers))
    return lines


def card_tables(path: Path) -> str:
    """Return the tables of a run on a CUDA card: rates of the forward pass, other figures, and what has no number."""
    content = json.loads(path.read_text(encoding="utf-8"))
    found, rows = content["machine"], content["rows"]
    versions = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
    state = found["card"].get("state", "")
    parts = [f"{found['card']['name']} ({state}); Python {found['python']}, {versions}; {found['date']}."]
    if rows:
        names = list(dict.fromkeys(name for row in rows for name in row["tflops"]))
        best = "best of torch / ours"
        columns = ("forward, TFLOP/s", "kernel", *names, best)
        parts.append(markdown(columns, [card_line(row, names) for row in sorted(rows, key=in_order)]))
    if content["figures"]:
        figures = [(row["what"], f"{row['figure']:.3g} {row['unit']}") for row in content["figures"]]
        parts.append(markdown(("on the card", "figure"), figures))
    for title, entries in (("Wrong, so not measured", content["red"]), ("Left out for time", content["left_out"])):
        if entries:
            parts.append(f"{title}: {'; '.join(entries)}.")
    return "\n\n".join(parts)


def card_line(row: dict[str, Any], names: list[str]) -> tuple[str, ...]:
    """Return the line of one size: rates by name, and the ratio to the fastest of torch's backends."""
    rates = (f"{row['tflops'][name]:.3g}" if name in row["tflops"] else "-" for name in names)
    peers = [ratio for name, ratio in row["ratio"].items() if not name.startswith("ours")]
    return row["label"], row["kernel"], *rates, f"{min(peers):.2f}" if peers else "-"


def in_order(row: dict[str, Any]) -> tuple[Any, ...]:
    """Return what lines are sorted by: dtype, head size, full before causal, length."""
    return row["dtype"], row["D"], row["causal"], row["N"]


def describe(machine: dict[str, Any]) -> str:
    """Return one line on the machine of the first file."""
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    return (
        f"{machine['processor']}, {machine['cores']} cores; Python {machine['python']}, {versions}; {machine['date']}."
    )


if __name__ == "__main__":
    main()
