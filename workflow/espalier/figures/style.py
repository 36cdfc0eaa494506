"""One look for all charts, and files that are the same bytes for the same numbers.

Charts are built on `matplotlib.figure.Figure`, never on pyplot, and inside `styled()`, so that nothing global changes.
A chart is a band with title and legend, the panels, and a band of small lines with all that a reader must know.
"""

from __future__ import annotations

import itertools
import os
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from espalier.figures import MEASURED

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from pandas import DataFrame

# Okabe and Ito's palette, told apart with any colour vision; for charts that do not reproduce a paper's colours.
BLACK, ORANGE, SKY, GREEN, YELLOW, BLUE, VERMILION, PURPLE = (
    "#000000",
    "#E69F00",
    "#56B4E9",
    "#009E73",
    "#F0E442",
    "#0072B2",
    "#D55E00",
    "#CC79A7",
)
GAP = "#B00020"  # the mark for "out of memory"
# Outcomes whose reason stands in the footer, in the words for one and for several.
WHY = {"unavailable": ("is unavailable", "are unavailable"), "failed": ("failed", "failed")}
MISSING = "missing"  # how the outcome of a result that is not there begins
NAMED = 4  # names of what a panel lacks; the others are counted
MUTED = "#555555"
STYLE = {
    "font.family": ["DejaVu Sans"],
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.labelsize": 9,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "legend.fontsize": 8.5,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": False,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.4,
    "hatch.linewidth": 0.6,
    "figure.facecolor": "white",
    "savefig.dpi": 200,
    "svg.hashsalt": "espalier",
    "pdf.fonttype": 42,
}
ERROR_BAR = {"elinewidth": 0.9, "capsize": 2.0, "capthick": 0.9, "ecolor": "#333333"}
# Without dates (and the library's version, for SVG and PDF) the same numbers give the same bytes.
METADATA = {
    "pdf": {"CreationDate": None, "Producer": None, "Creator": "Espalier"},
    "svg": {"Date": None, "Creator": "Espalier"},
    "png": {"Software": "Espalier"},
}
# Bytes in the "MB" and "GB" of all charts and tables. The published tables use these binary units: each mean of the
# quantization table times its 1962 questions is a whole number of the allocator's 512-byte blocks only if its MB is
# 2**20 bytes; and the bar of the 6.7B model, read off as 12.4 GB, is near its 12.6 GiB of weights, far from 13.5e9.
MB, GB = 2**20, 2**30


@contextmanager
def styled() -> Iterator[None]:
    """Apply the shared style to what is drawn inside, and to nothing else."""
    import matplotlib

    with matplotlib.rc_context(STYLE):
        yield


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure whose panels share width by height inches; `frame` adds the bands above and below."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def frame(figure: Figure, title: str, handles: Sequence = (), footer: Iterable[str] = ()) -> None:
    """Add the title and the legend above the panels and the footer's lines below, then settle the layout."""
    width, height = figure.get_size_inches()
    lines = _fill([line for line in footer if line], int(width * 17))
    titles = textwrap.wrap(title, int(width * 11)) if title else []
    columns = _legend_columns([handle.get_label() for handle in handles], width)
    legend_rows = -(-len(handles) // columns) if handles else 0
    top = 0.12 + 0.22 * len(titles) + 0.2 * legend_rows + (0.06 if handles else 0)
    bottom = 0.08 + 0.145 * len(lines)
    total = height + top + bottom
    figure.set_size_inches(width, total)
    if titles:
        figure.text(0.5, 1 - 0.08 / total, "\n".join(titles), ha="center", va="top", fontsize=11, fontweight="bold")
    if handles:
        anchor = (0.5, 1 - (0.06 + 0.22 * len(titles)) / total)
        figure.legend(handles=handles, loc="upper center", bbox_to_anchor=anchor, ncols=columns, borderaxespad=0.2)
    if lines:
        figure.text(0.08 / width, 0.06 / total, "\n".join(lines), ha="left", va="bottom", fontsize=7.5, color=MUTED)
    engine = figure.get_layout_engine()
    engine.set(rect=(0, bottom / total, 1, height / total), w_pad=0.06, h_pad=0.05)
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    _round_places(figure)


def _round_places(figure: Figure) -> None:
    # The layout's solver differs in the last bits from one run to the next, and an SVG's ids hash all bits.
    for part in figure.subfigs:
        part.bbox_relative.p0, part.bbox_relative.p1 = part.bbox_relative.p0.round(6), part.bbox_relative.p1.round(6)
    for axes in figure.axes:
        axes.set_position([round(number, 6) for number in axes.get_position().bounds])


def _fill(sentences: Sequence[str], width: int) -> list[str]:
    """Put sentences on lines of `width` characters; a sentence starts a new line if it does not fit on the last."""
    lines: list[str] = []
    for sentence in sentences:
        if lines and len(lines[-1]) + 2 + len(sentence) <= width:
            lines[-1] += "  " + sentence
        else:
            lines += textwrap.wrap(sentence, width)
    return lines


def _legend_columns(labels: Sequence[str], width: float) -> int:
    if sum(0.62 + 0.075 * len(label) for label in labels) < width:
        return max(1, len(labels))
    longest = max((len(label) for label in labels), default=1)
    fitting = max(1, int((width - 0.2) / (0.62 + 0.075 * longest)))
    rows = -(-len(labels) // fitting)
    return max(1, -(-len(labels) // max(rows, 1)))


def footer_lines(points: DataFrame, known: Sequence[str], note: str = "", column: str = "series") -> list[str]:
    """Return the lines that say what is absent or cannot run, on what was measured, and how sure published values are.

    `known` are the chart's names in `column`; those without any value are listed, never invented. What is missing of
    the results that the chart plots is for the panels to say (`lacking`).
    """
    lines = [note] if note else []
    has_value = points[points["outcome"] == "ok"]
    outcomes = points["outcome"].astype(str)
    gaps = points[outcomes.str.startswith(MISSING)]
    placed = having_place(points)
    present = set(placed[column])
    reasons: dict[tuple, list[str]] = {}  # kind of outcome, whether of all points, reason → names
    for name, outcome in zip(points[column], outcomes, strict=True):
        kind, _, reason = outcome.partition(":")
        if kind in WHY:
            names = reasons.setdefault((kind, name in present, reason.strip().rstrip(".")), [])
            names += [name] if name not in names else []
    absent = [name for name in known if name not in {*present, *gaps[column], *itertools.chain(*reasons.values())}]
    measured = bool((points["certainty"] == MEASURED).any()) or points.empty
    if absent:
        lines.append(f"No {'results in this study' if measured else 'published values'}: {', '.join(absent)}.")
    for (kind, in_part, reason), names in reasons.items():
        said = WHY[kind][len(names) > 1] + " in part" * in_part
        lines.append(f"{', '.join(names)} {said}: {reason or 'no reason given'}.")
    if (points["outcome"] == "oom").any():
        lines.append("OOM: out of memory.")
    devices = sorted(set(placed["device"].dropna()) - {"", "GPU"})
    if devices:
        lines.append(f"Device: {', '.join(device_name(device) for device in devices)}.")
    certainty = [str(value) for value in has_value["certainty"].dropna().unique() if value != MEASURED]
    if certainty:
        said = ("faded, " * name.startswith("unreliable") + name for name in sorted(certainty))
        lines.append(f"Certainty of the published values: {'; '.join(said)}.")
    return lines


def having_place(points: DataFrame) -> DataFrame:
    """Return the points that a chart shows, as a value or as memory that ran out; of the others it says why."""
    return points[~points["outcome"].astype(str).str.startswith((*WHY, MISSING))]


def lacking(points: DataFrame, name: Callable[[dict], str], absent: Iterable[str] = ()) -> list[str]:
    """Return what a panel lacks, in words: results that are missing, and averages over fewer seeds than others.

    `name` makes of a point the name by which the panel's readers know it; `absent` are names without any point.
    """
    counts = points["seeds"].astype("float64")
    found: dict[str, list[str]] = {"No result": list(absent)}
    for row, seeds in zip(points.to_dict("records"), counts, strict=True):
        if str(row["outcome"]).startswith(MISSING):
            names = found["No result"]
        elif row["outcome"] == "ok" and seeds < counts.max():
            names = found.setdefault(f"{seeds:.0f} of {counts.max():.0f} seeds", [])
        else:
            continue
        names += [name(row)] if name(row) not in names else []
    more = {said: f", and {len(names) - NAMED} more" if len(names) > NAMED else "" for said, names in found.items()}
    return [f"{said}: {', '.join(names[:NAMED])}{more[said]}" for said, names in found.items() if names]


def say_lacking(axes: Axes, sentences: Sequence[str]) -> None:
    """Write above a panel, between it and its title, what it lacks."""
    width = axes.figure.bbox.width / axes.figure.dpi / axes.get_gridspec().ncols
    lines = _fill(sentences, int(width * 15))
    if lines:
        look = {"ha": "center", "va": "bottom", "fontsize": 6.5, "color": MUTED, "annotation_clip": False}
        offset = {"xycoords": "axes fraction", "textcoords": "offset points"}
        axes.annotate("\n".join(lines), (0.5, 1), (0, 3), **offset, **look)
        axes.set_title(axes.get_title(), pad=6 + 8 * len(lines))


def save(figure: Figure, prefix: Path) -> list[Path]:
    """Write prefix.pdf, .svg and .png; each appears whole or not at all, with the same bytes for the same chart."""
    prefix = Path(prefix)
    prefix.parent.mkdir(parents=True, exist_ok=True)
    files = []
    with styled():
        for kind, metadata in METADATA.items():
            target = prefix.with_name(f"{prefix.name}.{kind}")
            partial = prefix.with_name(f".{prefix.name}.{os.getpid()}.{kind}")
            try:
                figure.savefig(partial, format=kind, metadata=metadata)
                os.replace(partial, target)
            finally:
                partial.unlink(missing_ok=True)
            files.append(target)
    return files


def parameters_label(count: float) -> str:
    """Return a parameter count as charts print it: 652K, 1.4M, 110M, 4.9B."""
    if count < 1e3:
        return f"{count:.0f}"
    for limit, factor, unit in ((999.5e3, 1e3, "K"), (999.5e6, 1e6, "M"), (float("inf"), 1e9, "B")):
        if count < limit:
            number = count / factor
            return f"{number:.0f}{unit}" if unit == "K" or (unit == "M" and number >= 99.5) else f"{number:.1f}{unit}"
    raise AssertionError("unreachable")


def length_label(tokens: float) -> str:
    """Return a number of tokens as charts print it: 128, 1k (1000 or 1024), 32k."""
    tokens = int(tokens)
    for thousand in (1024, 1000):
        if tokens >= 1000 and tokens % thousand == 0:
            return f"{tokens // thousand}k"
    return str(tokens)


def memory_unit(largest: float | None) -> tuple[str, int]:
    """Return ("GB", 2**30) or ("MB", 2**20): the unit for an axis on which the largest value is `largest` bytes."""
    return ("GB", GB) if largest is not None and largest >= GB else ("MB", MB)


def memory_label(devices: Iterable[str], unit: str) -> str:
    """Return the axis label for peak memory: "VRAM Usage (GB)" as in the papers, "Peak memory (MB)" on a CPU."""
    on_cpu = all(is_cpu(device) for device in devices) if devices else False
    return f"{'Peak memory' if on_cpu else 'VRAM Usage'} ({unit})"


def is_cpu(device: str) -> bool:
    """Say whether a result's `device` column names a CPU."""
    return "cpu" in str(device).lower()


def device_name(device: str) -> str:
    """Return a device as the footer prints it."""
    return {"cpu": "CPU", "cuda": "CUDA GPU"}.get(str(device), str(device))


def number_label(value: float, digits: int = 3) -> str:
    """Return a number with `digits` significant digits and no exponent: 0.155, 12.4, 2,690."""
    if value == 0:
        return "0"
    from math import floor, log10

    decimals = max(0, digits - 1 - floor(log10(abs(value))))
    return f"{value:,.{decimals}f}"


def mark_gap(axes: Axes, place: float, outcome: str, horizontal: bool = False, fontsize: float = 6) -> None:
    """Write a small "OOM" or "missing", if that is the outcome, where the bar at `place` would stand, or lie."""
    if outcome == "oom":
        text, colour = "OOM", GAP
    elif outcome.startswith(MISSING):
        text, colour = MISSING, MUTED
    else:
        return
    look = {"fontsize": fontsize, "color": colour}
    if horizontal:
        axes.text(0.02, place, text, transform=axes.get_yaxis_transform(), va="center", ha="left", **look)
    else:
        transform = axes.get_xaxis_transform()
        axes.text(place, 0.02, text, transform=transform, va="bottom", ha="center", rotation=90, **look)


def say_empty(axes: Axes, text: str) -> None:
    """Write in an empty panel why it is empty, and take its ticks away."""
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", fontsize=7.5, color=MUTED)


def label_sparsely(figure: Figure, candidates: Sequence[tuple], fontsize: float = 6.5) -> None:
    """Write short labels beside points, skipping each that would cover a point, a line or an earlier label.

    `candidates` are (axes, x, y, text, colour), the most wanted first; all lines of their axes are avoided. Call after
    `frame`: places are final then.
    """
    import numpy as np
    from matplotlib.transforms import Bbox

    scale = figure.dpi / 72
    taken: dict[object, list[Bbox]] = {}
    for axes, x, y, _, _ in candidates:
        centre = axes.transData.transform((x, y))
        taken.setdefault(axes, []).append(Bbox.from_bounds(*(centre - 3 * scale), 6 * scale, 6 * scale))
    for axes, boxes in taken.items():
        for line in axes.get_lines():
            ends = axes.transData.transform(np.column_stack(line.get_data()).astype(float))
            for start, end in itertools.pairwise(ends):
                if np.isfinite([start, end]).all():
                    steps = max(1, int(np.hypot(*(end - start)) / (3 * scale)))
                    boxes += [Bbox.from_bounds(*spot, 0.1, 0.1) for spot in np.linspace(start, end, steps + 1)]
    for axes, x, y, text, colour in candidates:
        width, height = 0.64 * fontsize * len(text) * scale, 1.1 * fontsize * scale
        centre = axes.transData.transform((x, y))
        for dx, dy, ha, va in ((4, -4, "left", "top"), (-4, 4, "right", "bottom"), (4, 4, "left", "bottom")):
            left = centre[0] + dx * scale - (width if ha == "right" else 0)
            base = centre[1] + dy * scale - (height if va == "top" else 0)
            box = Bbox.from_bounds(left, base, width, height)
            inside = axes.bbox.x0 <= box.x0 and box.x1 <= axes.bbox.x1 + 4 * scale and axes.bbox.y0 <= box.y0
            if inside and not any(box.overlaps(other) for other in taken[axes]):
                taken[axes].append(box)
                axes.annotate(
                    text,
                    (x, y),
                    (dx, dy),
                    textcoords="offset points",
                    ha=ha,
                    va=va,
                    fontsize=fontsize,
                    color=colour,
                    annotation_clip=False,
                ).set_in_layout(False)
                break
