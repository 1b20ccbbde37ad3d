"""The table in kernels/README.md from the CSV: python -m fewstep.kernels.bench.table"""

from pathlib import Path

from fewstep.kernels.bench.record import FOLDER, UNMEASURED, Row, read

README = FOLDER.parent / "README.md"
BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"


def table(rows: list[Row]) -> str:
    """Markdown of all rows and, below it, where each measured one comes from."""
    lines = ["| op | case | what | value | goal | times or reference |", "|---|---|---|---|---|---|"]
    lines += [f"| {r.op} | {r.case} | {r.metric} | {r.value} | {r.at_least} | {r.detail} |" for r in rows]
    sources = []
    for r in rows:
        if r.value == UNMEASURED:
            continue
        place = f"{r.hardware}{f', driver {r.driver}' if r.driver else ''}{f', {r.threads} threads' if r.threads else ''}"
        source = f"Measured: {place}; torch {r.torch}, triton {r.triton}, commit {r.commit}, {r.date}."
        if source not in sources:
            sources.append(source)
    return "\n".join([*lines, "", *sources])


def render(text: str, rows: list[Row]) -> str:
    """text with everything between the markers replaced; ValueError when a marker is missing."""
    if BEGIN not in text or END not in text:
        raise ValueError(f"README.md: markers {BEGIN} and {END} are needed")
    head, rest = text.split(BEGIN, 1)
    return f"{head}{BEGIN}\n{table(rows)}\n{END}{rest.split(END, 1)[1]}"


def main(path: Path = README) -> None:
    """Rewrites the table in place."""
    path.write_text(render(path.read_text(), read()))


if __name__ == "__main__":
    main()
