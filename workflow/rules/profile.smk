"""Profile: time and memory of a model are measured.

In:  {chain}/model/  environments/{environment}.json
Out: {chain}/profile/{workload}.json
"""


rule profile_model:
    """Measure time and memory of a model under a workload."""
    input:
        model=f"{RUN}/{{chain}}/model",
        data=lambda w: STUDY.data("workloads", w.workload),
        environment=lambda w: STUDY.environment_files(w.workload),
    output:
        result=f"{RUN}/{{chain}}/profile/{{workload}}.json",
    log:
        f"{STUDY.root}/logs/profile_model/{{model}}.s{{seed}}.{{chain}}.{{workload}}.log",
    benchmark:
        f"{STUDY.root}/benchmarks/profile_model/{{model}}.s{{seed}}.{{chain}}.{{workload}}.tsv"
    conda:
        "../../envs/main.yaml"
    threads: lambda w: os.cpu_count() if STUDY.timed(w.workload) else 1  # a timing shares the machine with no job
    params:
        recipe=lambda w: STUDY.content("workloads", w.workload),
        code=lambda w: STUDY.code("profile_model.py", "workloads", w.workload),
        commits=lambda w: hub.commits(STUDY, "workloads", w.workload),
        device=STUDY.config.device,
        gpus=lambda w, resources: STUDY.gpus(resources, workflow.remote_exec),
        study=STUDY.name,
    shell:
        "{params.gpus}python workflow/scripts/profile_model.py --model {input.model} --recipe {params.recipe:q}"
        " --device {params.device} --environment {input.environment} --output {output.result} --study {params.study}"
        " --model-name {wildcards.model} --seed {wildcards.seed} --chain {wildcards.chain} --name {wildcards.workload}"
        " 2>&1 | tee {log}"
