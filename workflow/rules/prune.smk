"""Prune: parts of a model are removed.

In:  {parent}/model/  calibration/{text}.json
Out: {parent}+{recipe}/model/  {parent}+{recipe}/step.json
"""


rule prune_model:
    """Remove blocks, heads or neurons from a model."""
    input:
        parent=f"{RUN}/{{parent}}/model",
        data=lambda w: STUDY.data("recipes", w.recipe),
        calibration=lambda w: STUDY.calibration_check(w.recipe),
    output:
        model=directory(f"{RUN}/{{parent}}+{{recipe}}/model"),
        step=f"{RUN}/{{parent}}+{{recipe}}/step.json",
    log:
        f"{STUDY.root}/logs/prune_model/{{model}}.s{{seed}}.{{parent}}+{{recipe}}.log",
    benchmark:
        f"{STUDY.root}/benchmarks/prune_model/{{model}}.s{{seed}}.{{parent}}+{{recipe}}.tsv"
    wildcard_constraints:
        recipe=STUDY.rule_pattern("prune_model"),
    conda:
        "../../envs/main.yaml"
    params:
        recipe=lambda w: STUDY.content("recipes", w.recipe),
        code=lambda w: STUDY.code("prune_model.py", "recipes", w.recipe),
        device=STUDY.config.device,
        gpus=lambda w, resources: STUDY.gpus(resources, workflow.remote_exec),
        study=STUDY.name,
    shell:
        "{params.gpus}python workflow/scripts/prune_model.py --parent {input.parent} --recipe {params.recipe:q}"
        " --device {params.device} --output {output.model} --step {output.step} --study {params.study}"
        " --model-name {wildcards.model} --seed {wildcards.seed} --chain {wildcards.parent}+{wildcards.recipe}"
        " --name {wildcards.recipe} 2>&1 | tee {log}"
