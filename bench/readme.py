"""`python -m bench.readme`: writes the figures of `bench/results/` into the README, so that none is typed by hand."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import msgspec

from bench.report import RESULTS
from megatron_flashrecovery.runtime.summary import replace_file

README = Path(__file__).parent.parent / "README.md"
_HEAD = ("| figure | measured | target | met | again with |", "|---|---|---|---|---|")
_BEGIN, _END = "<!-- figures:", "<!-- end of figures -->"


def figures_table(results: Path) -> str:
    """Markdown: one row per figure, with the command that repeats it."""
    on_host = [_row(f, f"make bench BENCH={name}") for name, report in _reports(results) for f in report["figures"]]
    if not on_host:
        return "No bench has been run yet."
    return "\n".join([*_HEAD, *on_host, *_on_gpus(results / "gpu")])


def _on_gpus(results: Path) -> list[str]:
    reports = _reports(results)
    if not reports:
        return []
    machine = reports[0][1]["machine"]
    rows = [_row(figure, "make gpu") for _, report in reports for figure in report["figures"]]
    return ["", f"On {machine['gpus']} x {machine['gpu']}:", "", *_HEAD, *rows]


def with_figures(readme: str, table: str) -> str:
    before, begin, rest = readme.partition(_BEGIN)
    marker, _, rest = rest.partition("\n")
    _, end, after = rest.partition(_END)
    assert begin, "the README has lost its marker for figures"
    assert end, "the README has lost the end of its figures"
    return f"{before}{begin}{marker}\n{table}\n{end}{after}"


def _reports(results: Path) -> list[tuple[str, dict[str, Any]]]:
    return [
        (path.stem, msgspec.json.decode(path.read_bytes(), type=dict[str, Any]))
        for path in sorted(results.glob("*.json"))
    ]


def _row(figure: dict[str, Any], again: str) -> str:
    value = f"{figure['value']:.4g} {figure['unit']}"
    cells = (figure["name"], value, figure["target"] or "", _met(figure["met"]), f"`{again}`")
    return f"| {' | '.join(cells)} |"


def _met(met: bool | None) -> str:
    return {True: "yes", False: "**missed**", None: ""}[met]


if __name__ == "__main__":
    replace_file(README, with_figures(README.read_text(), figures_table(RESULTS)).encode())
    sys.exit(0)
