"""Tune: a model is trained further.

In:  {parent}/model/
Out: {parent}+{recipe}/model/  {parent}+{recipe}/step.json
"""


rule tune_model:
    """Train a model further, or give it a head and train that on a task."""
    input:
        parent=f"{RUN}/{{parent}}/model",
        data=lambda w: STUDY.data("recipes", w.recipe),
    output:
        model=directory(f"{RUN}/{{parent}}+{{recipe}}/model"),
        step=f"{RUN}/{{parent}}+{{recipe}}/step.json",
    log:
        f"{STUDY.root}/logs/tune_model/{{model}}.s{{seed}}.{{parent}}+{{recipe}}.log",
    benchmark:
        f"{STUDY.root}/benchmarks/tune_model/{{model}}.s{{seed}}.{{parent}}+{{recipe}}.tsv"
    wildcard_constraints:
        recipe=STUDY.rule_pattern("tune_model"),
    conda:
        "../../envs/main.yaml"
    params:
        recipe=lambda w: STUDY.content("recipes", w.recipe),
        code=lambda w: STUDY.code("tune_model.py", "recipes", w.recipe),
        device=STUDY.config.device,
        gpus=lambda w, resources: STUDY.gpus(resources, workflow.remote_exec),
        study=STUDY.name,
        # Not an output: Snakemake removes outputs before a job, and what a killed training saved is to be found again.
        state=f"{RUN}/{{parent}}+{{recipe}}/training-state",
        # Depends on a resource, so Snakemake does not count it among the reasons to run a finished job again.
        processes=lambda w, resources: STUDY.processes(w.recipe, resources),
    # A cluster sends SIGTERM to all processes of a job. The shell and tee outlive it, so that the training, which has a
    # handler of its own, can save itself and say so.
    shell:
        "trap '' TERM; {params.gpus}python workflow/scripts/tune_model.py --parent {input.parent}"
        " --recipe {params.recipe:q} --device {params.device} --output {output.model} --step {output.step}"
        " --state {params.state} --processes {params.processes} --study {params.study}"
        " --model-name {wildcards.model} --seed {wildcards.seed} --chain {wildcards.parent}+{wildcards.recipe}"
        " --name {wildcards.recipe} 2>&1 | tee {log}"
