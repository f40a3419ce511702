"""A measurement as a table for people."""

from typing import Any


def table(result: dict[str, Any]) -> str:
    """Markdown: the rows, then what they were measured on and whether they may be quoted."""
    sides = list(result["rows"][0]["median"])
    ratio = ["ratio: median (least to most)"] if any(row["ratio"] for row in result["rows"]) else []
    lines = [" | ".join(["", "", *sides, *ratio, ""]).strip(" ")]
    lines.append("|---" * (lines[0].count("|") - 1) + "|")
    for row in result["rows"]:
        cells = [row["what"], *(_shown(row["median"][side], row["unit"]) for side in sides)]
        if row["ratio"]:
            cells.append("{median:.3f} ({least:.3f} to {most:.3f})".format(**row["ratio"]))
        lines.append("| " + " | ".join(cells) + " |")
    facts = result["setting"] | result["machine"]
    lines += ["", ", ".join(f"{name}: {value}" for name, value in facts.items() if name != "publishable")]
    if not result["machine"]["publishable"]:
        lines.append("NOT TO BE QUOTED: the machine had other work when this started; run it again when it is idle.")
    return "\n".join(lines)


def _shown(value: float, unit: str) -> str:
    if unit == "bytes":
        return f"{value / 2**20:.0f} MiB"
    return f"{value:.3g} s" if value >= 1 else f"{value * 1e3:.3g} ms"
