"""Tables: tidy rows of raw results.

In:  raw results
Out: tables/metrics.csv  tables/quantization.json  tables/quantization_paired.csv  tables/published.csv
"""

from espalier import comparisons


# A second or two each, made where snakemake runs: no cluster's queue is worth them.
localrules:
    make_metrics,


TABLES = [f"{STUDY.root}/tables/metrics.csv", f"{STUDY.root}/tables/calibration.json"]


rule make_metrics:
    """Make the tidy table of everything that was measured."""
    input:
        results=STUDY.raw_results(),
    output:
        table=f"{STUDY.root}/tables/metrics.csv",
    log:
        f"{STUDY.root}/logs/make_metrics.log",
    benchmark:
        f"{STUDY.root}/benchmarks/make_metrics.tsv"
    conda:
        "../../envs/main.yaml"
    params:
        code=STUDY.code("make_metrics.py"),
    shell:
        "python workflow/scripts/make_metrics.py --results {input.results} --output {output.table} 2>&1 | tee {log}"


if "quantization_tradeoff" in STUDY.resolved.figures:
    TABLES += [f"{STUDY.root}/tables/{name}" for name in ("quantization.json", "quantization_paired.csv")]

    localrules:
        make_quantization_table,

    rule make_quantization_table:
        """Make the table of quantized variants with the published table's names and keys, and their paired tests."""
        input:
            results=STUDY.figure_results("quantization_tradeoff"),
        output:
            table=f"{STUDY.root}/tables/quantization.json",
            paired=f"{STUDY.root}/tables/quantization_paired.csv",
        log:
            f"{STUDY.root}/logs/make_quantization_table.log",
        benchmark:
            f"{STUDY.root}/benchmarks/make_quantization_table.tsv"
        conda:
            "../../envs/main.yaml"
        params:
            recipe=lambda w: STUDY.content("figures", "quantization_tradeoff"),
            code=STUDY.code("make_quantization_table.py"),
        shell:
            "python workflow/scripts/make_quantization_table.py --recipe {params.recipe:q} --results {input.results}"
            " --output {output.table} --paired {output.paired} 2>&1 | tee {log}"


if STUDY.config.compare:
    TABLES.append(f"{STUDY.root}/tables/published.csv")

    localrules:
        make_published_table,

    rule make_published_table:
        """Make the table of published values: ours beside each, the difference, and whether that is tolerated."""
        input:
            results=STUDY.comparison_results(),
            published=comparisons.files(STUDY.resolved),
        output:
            table=f"{STUDY.root}/tables/published.csv",
        log:
            f"{STUDY.root}/logs/make_published_table.log",
        benchmark:
            f"{STUDY.root}/benchmarks/make_published_table.tsv"
        conda:
            "../../envs/main.yaml"
        params:
            comparisons=comparisons.content(STUDY.resolved),
            code=comparisons.code(STUDY.resolved),
        shell:
            "python workflow/scripts/make_published_table.py --comparisons {params.comparisons:q}"
            " --published reference/papers --results {input.results} --output {output.table} 2>&1 | tee {log}"


rule tables:
    """Make all tables of this study."""
    input:
        TABLES,
