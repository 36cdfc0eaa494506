"""What each metric means, read from docs/metrics.md, for pages that leave this repository without it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

from markdown_it import MarkdownIt
from markupsafe import Markup

PAGE = Path(__file__).parents[2] / "docs" / "metrics.md"
ANCHOR = "metrics-"  # what the ids of the page's sections begin with


class Definition(NamedTuple):
    """A metric's row of the page: its unit, what measures it, its definition and its standard error, as HTML."""

    metric: str
    unit: Markup
    made_by: Markup
    text: Markup
    stderr: Markup


class Section(NamedTuple):
    """A section of the page: its title, its id in a page made of it, and its text as HTML."""

    title: str
    anchor: str
    text: Markup


def of_metrics(names: Iterable[str], page: Path = PAGE) -> tuple[list[Definition], list[str]]:
    """Return the definitions of these metrics in the page's order, and the metrics that it does not define."""
    wanted = set(names)
    tables = list(_tables(_source(page)))
    errors = {row["of"]: row["standard error"] for table in tables for row in table if "standard error" in row}
    found = [
        Definition(
            metric,
            *(_inline(row[key]) for key in ("unit", "made by", "definition")),
            _inline(_error_of(metric, errors)),
        )
        for table in tables
        for row in table
        if "definition" in row and (metric := row["metric"].strip("`")) in wanted
    ]
    return found, sorted(wanted - {one.metric for one in found})


def sections(page: Path = PAGE) -> list[Section]:
    """Return the page's sections; what stands before the first one, without its tables, is `Metrics`."""
    intro, *parts = re.split(r"^## ", _source(page), flags=re.M)
    paragraphs = [part for part in intro.split("\n\n")[1:] if not part.lstrip().startswith("|")]
    found = [("Metrics", "\n\n".join(paragraphs))]
    found += [(title.strip(), body) for title, _, body in (part.partition("\n") for part in parts)]
    return [Section(title, ANCHOR + _slug(title), _block(body)) for title, body in found]


@cache
def _source(page: Path) -> str:
    """Return the page's Markdown: links to other files are their text alone, and its headings are of level 2 and 4."""
    text = page.read_text(encoding="utf-8")
    text = re.sub(r"\[([^\]]+)\]\((?!#)[^)]*\)", r"\1", text)
    return re.sub(r"^###", "####", text.replace("](#", f"](#{ANCHOR}"), flags=re.M)


def _slug(title: str) -> str:
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


@cache
def _parser() -> MarkdownIt:
    return MarkdownIt("commonmark", {"html": False}).enable("table")


def _inline(source: str) -> Markup:
    return Markup(_parser().renderInline(source))


def _block(source: str) -> Markup:
    """Return Markdown as HTML, each table in a box that scrolls."""
    text = _parser().render(source).replace("<th>", '<th scope="col">')
    return Markup(text.replace("<table>", '<div class="scroll"><table>').replace("</table>", "</table></div>"))


def _tables(source: str) -> Iterator[list[dict[str, str]]]:
    """Yield each table as rows of column → cell, both in Markdown."""
    cells: list[list[str]] | None = None
    for token in _parser().parse(source):
        if token.type == "table_open":
            cells = []
        elif cells is not None and token.type == "tr_open":
            cells.append([])
        elif cells and token.type == "inline":
            cells[-1].append(token.content)
        elif cells and token.type == "table_close":
            head, *rows = cells
            yield [dict(zip(head, row, strict=True)) for row in rows]
            cells = None


def _error_of(metric: str, errors: dict[str, str]) -> str:
    """Return what the table of standard errors says of a metric; `max_…_bytes` there stands for all such names."""
    for named, error in errors.items():
        for name in re.findall(r"`([^`]+)`", named):
            if re.fullmatch(re.escape(name).replace("…", ".*"), metric):
                return error
    return ""
