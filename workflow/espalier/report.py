"""A report: one HTML file that holds all of a study, to be read without this repository and without a network.

Charts are images of their own inside it, so that the ids of two SVGs cannot meet; there is no script. Everything that
comes from a config or a result is escaped.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

import jinja2
import yaml

from espalier import __version__, definitions, provenance, report_runs, report_tables, tables
from espalier.files import whole_file
from espalier.study import Study, Wanted

TEMPLATE = Path(__file__).parents[1] / "report" / "report.html"
EARLY = "early-report.html"  # what a failed run leaves beside the place of the whole report
MUCH = 60  # rows: a longer table is closed until somebody opens it


def write(study: Study, found: Mapping[Wanted, dict], output: Path, fresh: bool = False) -> list[Wanted]:
    """Write the report of a study whose raw results `found` are there; return those that are not.

    `fresh` says that all charts and tables were made of these; otherwise those that are older are left out. A report
    that lacks nothing takes an early one beside it away. Raises UserError if the file cannot be written.
    """
    missing = [one for one in study.everything() if one not in found]
    text = _environment().get_template(TEMPLATE.name).render(content(study, found, fresh))
    with whole_file(output) as partial:
        partial.write_text(text, encoding="utf-8")
    if not missing and output.name != EARLY:
        output.with_name(EARLY).unlink(missing_ok=True)
    return missing


def content(study: Study, found: Mapping[Wanted, dict], fresh: bool) -> dict:
    """Return what the template shows, by the names that it uses."""
    results = list(found.values())
    measured = {one["metric"] for result in results for one in result["measurements"]}
    defined, undefined = definitions.of_metrics(measured)
    now = time.time()
    charts = report_tables.charts(study, found, fresh)
    published = report_tables.published(study, found, fresh)
    quantized = report_tables.quantized(study, found, fresh)
    return {
        "study": study,
        "version": __version__,
        "made": provenance.circumstances(now),
        "number": report_tables.number,
        "much": MUCH,
        "found": len(found),
        "began": min((result["provenance"]["started"] for result in results), default=""),
        "last": max((result["provenance"]["started"] for result in results), default=""),
        "took": _duration(sum(result["provenance"]["seconds"] for result in results)),
        "models": report_runs.models(study, found),
        "datasets": report_runs.datasets(study),
        "charts": charts,
        "published": published,
        "quantized": quantized,
        "stale": [f"chart “{chart.title}”" for chart in charts if chart.picture is None]
        + ["table of published values"] * bool(study.config.compare and not published)
        + ["table of quantized variants"] * bool(report_tables.QUANTIZED in study.resolved.figures and not quantized),
        "variants": report_runs.variants(study, found),
        "methods": {section: report_runs.methods(study, section) for section in ("recipes", "suites", "workloads")},
        "calibrations": report_runs.calibrations(study),
        "machines": report_runs.machines(results),
        "commits": report_runs.commits(results),
        "warnings": tables.incomparable(results) + tables.disturbed(results),
        "definitions": defined,
        "undefined": undefined,
        "sections": definitions.sections(),
        "lacks": report_runs.lacks(results),
        "missing": report_runs.missing(study, found),
        "config": yaml.safe_dump(study.mapping, sort_keys=False, allow_unicode=True, width=100),
    }


def _duration(seconds: float) -> str:
    return f"{seconds / 3600:.1f} hours" if seconds >= 3600 else f"{seconds / 60:.1f} minutes"


def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATE.parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
