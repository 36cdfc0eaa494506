"""Environments: engines whose pins conflict with the main environment have one of their own, built from its lock.

In:  envs/{environment}.lock
Out: environments/{environment}.json  ../environments/{environment}/venv-*/, shared by all studies
"""


# It needs internet, so it runs where snakemake is typed.
localrules:
    build_environment,


rule build_environment:
    """Build the environment of an engine, or find that it is there; say where its Python is, or why there is none."""

    # The lock's content is what counts, not its time, and so the file is no input. The environment is no output, for
    # another study may have built it, or may use it. How it is built is no reason to measure again.
    output:
        found=f"{STUDY.root}/environments/{{environment}}.json",
    log:
        f"{STUDY.root}/logs/build_environment/{{environment}}.log",
    benchmark:
        f"{STUDY.root}/benchmarks/build_environment/{{environment}}.tsv"
    conda:
        "../../envs/main.yaml"
    params:
        lock=lambda w: environments.lock_file(w.environment),
        content=lambda w: environments.digest(environments.lock_file(w.environment)),
        python=environments.python_version(),
        folder=lambda w: STUDY.environment_folder(w.environment),
        trial=lambda w: environments.trial(STUDY.environment_file(w.environment)),
    shell:
        "python workflow/scripts/build_environment.py --lock {params.lock} --folder {params.folder}"
        " --trial {params.trial} --output {output.found} 2>&1 | tee {log}"
