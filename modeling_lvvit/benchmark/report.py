"""Figures as a table."""

COLUMNS = {
    "model": "{}",
    "parameters": "{:,}",
    "gflops": "{:.2f}",
    "milliseconds": "{:.1f}",
    "images_per_second": "{:.1f}",
    "ratio": "{:.2f}",
    "ratio_per_flop": "{:.2f}",
    "ceiling_share": "{:.0%}",
    "peak_megabytes": "{:,.0f}",
}


def table(rows: list[dict[str, object]]) -> str:
    """The columns of `COLUMNS` that any row has, aligned."""
    names = [name for name in COLUMNS if any(name in row for row in rows)]
    cells = [[COLUMNS[name].format(row[name]) if name in row else "" for name in names] for row in rows]
    lines = [[name.replace("_", " ") for name in names], *cells]
    widths = [max(len(line[column]) for line in lines) for column in range(len(names))]
    first, *others = widths
    return "\n".join(
        line[0].ljust(first) + "".join(f"  {cell:>{width}}" for cell, width in zip(line[1:], others)) for line in lines
    )
