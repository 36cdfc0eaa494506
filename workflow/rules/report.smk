"""Report: one page with all of a study, to hand to somebody.

In:  charts, tables and raw results
Out: report.html

A run some of whose jobs failed writes early-report.html at its end (takeover.py), of what is there.
"""

import json
from pathlib import Path

from espalier.files import sha256


# A few seconds, where snakemake runs: no cluster's queue is worth them.
localrules:
    write_report,


rule write_report:
    """Write the study's report."""
    input:
        results=STUDY.raw_results(),
        tables=rules.tables.input,
        charts=expand(f"{STUDY.figures}/{{figure}}.svg", figure=STUDY.resolved.figures),
        numbers=expand(f"{STUDY.figures}/{{figure}}.csv", figure=STUDY.resolved.figures),
    output:
        report=f"{STUDY.root}/report.html",
    log:
        f"{STUDY.root}/logs/write_report.log",
    benchmark:
        f"{STUDY.root}/benchmarks/write_report.tsv"
    conda:
        "../../envs/main.yaml"
    params:
        study=lambda w: json.dumps(STUDY.mapping, default=str),
        code=STUDY.code("write_report.py"),
        words=lambda w: [sha256(Path(file)) for file in ("docs/metrics.md", "workflow/report/report.html")],
    shell:
        "python workflow/scripts/write_report.py --configfile - --results {input.results} --output {output.report}"
        " <<< {params.study:q} 2>&1 | tee {log}"


rule report:
    """Write the study's report, once its charts and tables are made."""
    input:
        rules.write_report.output,
