"""Figures: each chart is drawn from the raw results that it plots, or from published values alone.

In:  raw results, reference/papers/ (also for a chart of this study, if it shows published values beside its own)
Out: figures/{study}/{figure}.{pdf,svg,png,csv}  figures/reference/{figure}.{pdf,svg,png,csv}

Charts that lack results are in figures/{study}/early/. No rule draws them: a run some of whose jobs failed does at its
end (takeover.py), and draw_figure takes an early chart away when it has drawn the complete one.
"""

import glob

from espalier import plugins, published_points


# A second or two each, drawn where snakemake runs: no cluster's queue is worth them.
localrules:
    draw_figure,
    draw_reference_figure,


rule draw_figure:
    """Draw a chart of this study from its raw results."""
    input:
        results=lambda w: STUDY.figure_results(w.figure),
        published=lambda w: published_points.files(w.figure, STUDY.step("figures", w.figure).content),
    output:
        multiext(f"{STUDY.figures}/{{figure}}", ".pdf", ".png", ".csv"),
        svg=f"{STUDY.figures}/{{figure}}.svg",
    log:
        f"{STUDY.root}/logs/draw_figure/{{figure}}.log",
    benchmark:
        f"{STUDY.root}/benchmarks/draw_figure/{{figure}}.tsv"
    wildcard_constraints:
        figure=STUDY.pattern(STUDY.resolved.figures),
    conda:
        "../../envs/main.yaml"
    params:
        recipe=lambda w: STUDY.content("figures", w.figure),
        code=lambda w: STUDY.code("draw_figure.py", "figures", w.figure),
        prefix=lambda w, output: os.path.splitext(output.svg)[0],
    shell:
        "python workflow/scripts/draw_figure.py --figure {wildcards.figure} --recipe {params.recipe:q}"
        " --results {input.results} --output {params.prefix} 2>&1 | tee {log}"


rule draw_reference_figure:
    """Draw a chart from published values alone."""
    input:
        published=sorted(glob.glob("reference/papers/*.csv")),
    output:
        multiext("figures/reference/{figure}", ".pdf", ".svg", ".png", ".csv"),
    log:
        "results/reference/logs/{figure}.log",
    benchmark:
        "results/reference/benchmarks/{figure}.tsv"
    wildcard_constraints:
        figure="|".join(plugins.names("figures")),
    conda:
        "../../envs/main.yaml"
    params:
        code=lambda w: STUDY.code("draw_figure.py", module=f"espalier.figures.{w.figure}"),
        prefix=lambda w, output: os.path.splitext(output[0])[0],
    shell:
        "python workflow/scripts/draw_figure.py --figure {wildcards.figure} --published reference/papers"
        " --output {params.prefix} 2>&1 | tee {log}"


rule figures:
    """Draw all charts of this study."""
    input:
        expand(f"{STUDY.figures}/{{figure}}.svg", figure=STUDY.resolved.figures),


rule reference_figures:
    """Draw all charts from published values alone."""
    input:
        expand("figures/reference/{figure}.svg", figure=plugins.names("figures")),


# Each chart has a target of its own name: snakemake size_tradeoff.
for name in STUDY.resolved.figures:

    rule:
        name:
            name
        input:
            f"{STUDY.figures}/{name}.svg",
            STUDY.calibration_table(name),
