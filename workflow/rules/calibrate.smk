"""Calibrate: no text that prune and quantize measure on holds what a suite evaluates.

In:  nothing but recipes, and generated datasets
Out: calibration/{text}.json  tables/calibration.json
"""


rule check_calibration:
    """Look for evaluated text in a text of calibration sets, before anything is calibrated on it."""
    input:
        data=STUDY.calibration_data(),
    output:
        table=f"{STUDY.root}/calibration/{{text}}.json",
    log:
        f"{STUDY.root}/logs/check_calibration/{{text}}.log",
    benchmark:
        f"{STUDY.root}/benchmarks/check_calibration/{{text}}.tsv"
    conda:
        "../../envs/main.yaml"
    params:
        # These depend on a resource, so Snakemake does not count them among the reasons to run a finished job again:
        # all that is calibrated on the text would be made again for an edit to a suite. The table below sees the edit.
        calibrations=lambda w, resources: STUDY.calibrations(w.text),
        suites=lambda w, resources: STUDY.suites(),
    shell:
        "python workflow/scripts/check_calibration.py --calibrations {params.calibrations:q}"
        " --suites {params.suites:q} --output {output.table} 2>&1 | tee {log}"


rule make_calibration_table:
    """Look for evaluated text in all texts of calibration sets, and say what was compared."""
    input:
        data=STUDY.calibration_data(),
    output:
        table=f"{STUDY.root}/tables/calibration.json",
    log:
        f"{STUDY.root}/logs/make_calibration_table.log",
    benchmark:
        f"{STUDY.root}/benchmarks/make_calibration_table.tsv"
    priority: 20  # a leak that an edit made stops the rest
    conda:
        "../../envs/main.yaml"
    params:
        calibrations=STUDY.calibrations(),
        suites=STUDY.suites(),
        commits=[hub.commits(STUDY, "suites", suite) for suite in STUDY.resolved.suites],
        code=STUDY.calibration_code(),
    shell:
        "python workflow/scripts/check_calibration.py --calibrations {params.calibrations:q}"
        " --suites {params.suites:q} --output {output.table} 2>&1 | tee {log}"
