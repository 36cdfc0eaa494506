"""Draw a chart, of raw results or of published values, as PDF, SVG and PNG, with the plotted numbers as CSV.

A recipe that says `published: true` shows the values of reference/papers, or of --published, beside the measured ones.

python workflow/scripts/draw_figure.py --figure glue_bits --published reference/papers --output my/glue_bits
python workflow/scripts/draw_figure.py --figure glue_bits --recipe '{"title": …}' --results my/*.json --output my/bits
"""

from __future__ import annotations

from pathlib import Path

from espalier import cli, drawing, plugins, published_points, tables


def main(argv: list[str] | None = None) -> None:
    parser = cli.parser(__doc__)
    parser.add_argument("--figure", choices=plugins.names("figures"), required=True, help="which chart")
    parser.add_argument("--recipe", type=cli.mapping, help="JSON: what a chart of measured values plots")
    parser.add_argument("--published", type=Path, help="folder of published values; without --recipe, these alone")
    parser.add_argument("--results", type=Path, nargs="*", default=[], help="raw results (JSON)")
    parser.add_argument("--output", type=Path, required=True, help="path to write to, without a suffix")
    arguments = parser.parse_args(argv)
    papers = arguments.published or published_points.PAPERS
    if arguments.recipe is None:
        module = plugins.load("figures", arguments.figure)
        points, title = module.published(papers), module.PUBLISHED_TITLE
    else:
        results = [tables.read(path) for path in arguments.results]
        points, title = drawing.measured(arguments.figure, arguments.recipe, results, papers)
    drawing.save(arguments.figure, points, title, arguments.output)
    drawing.remove_early(arguments.output)


if __name__ == "__main__":
    cli.run(main)
