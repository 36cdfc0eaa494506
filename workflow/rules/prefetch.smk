"""Prefetch: what the study needs of the hub, for compute nodes without internet.

In:  the config  environments/{environment}.json
Out: the hub's cache  prefetch.json
"""


# It needs internet, so it runs where snakemake is typed.
localrules:
    prefetch,


rule prefetch:
    """Download every model and data set of the hub that this study reads, pinned, into the hub's cache."""
    input:
        environments=lambda w: STUDY.environment_files(),
    # The manifest is no output: a job without one runs whenever it is asked for, and the cache may have been cleaned.
    log:
        f"{STUDY.root}/logs/prefetch.log",
    conda:
        "../../envs/main.yaml"
    params:
        needed=hub.as_json(STUDY),
        manifest=hub.manifest_file(STUDY),
        study=STUDY.name,
    shell:
        "python workflow/scripts/prefetch_hub.py --study {params.study} --needed {params.needed:q}"
        " --manifest {params.manifest} 2>&1 | tee {log}"
