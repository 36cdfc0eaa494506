"""Quantize: a model's weights are stored in fewer bits.

In:  {parent}/model/  calibration/{text}.json (not for distill_model)
Out: {parent}+{recipe}/model/  {parent}+{recipe}/step.json
"""


rule quantize_model:
    """Store a model's weights in fewer bits."""
    input:
        parent=f"{RUN}/{{parent}}/model",
        data=lambda w: STUDY.data("recipes", w.recipe),
        calibration=lambda w: STUDY.calibration_check(w.recipe),
    output:
        model=directory(f"{RUN}/{{parent}}+{{recipe}}/model"),
        step=f"{RUN}/{{parent}}+{{recipe}}/step.json",
    log:
        f"{STUDY.root}/logs/quantize_model/{{model}}.s{{seed}}.{{parent}}+{{recipe}}.log",
    benchmark:
        f"{STUDY.root}/benchmarks/quantize_model/{{model}}.s{{seed}}.{{parent}}+{{recipe}}.tsv"
    wildcard_constraints:
        recipe=STUDY.rule_pattern("quantize_model"),
    conda:
        "../../envs/main.yaml"
    params:
        recipe=lambda w: STUDY.content("recipes", w.recipe),
        code=lambda w: STUDY.code("quantize_model.py", "recipes", w.recipe),
        device=STUDY.config.device,
        gpus=lambda w, resources: STUDY.gpus(resources, workflow.remote_exec),
        study=STUDY.name,
    shell:
        "{params.gpus}python workflow/scripts/quantize_model.py --parent {input.parent} --recipe {params.recipe:q}"
        " --device {params.device} --output {output.model} --step {output.step} --study {params.study}"
        " --model-name {wildcards.model} --seed {wildcards.seed} --chain {wildcards.parent}+{wildcards.recipe}"
        " --name {wildcards.recipe} 2>&1 | tee {log}"


rule distill_model:
    """Train a student of a model, whose weights are stored in fewer bits, to compute what the model computes."""
    input:
        parent=f"{RUN}/{{parent}}/model",
        data=lambda w: STUDY.data("recipes", w.recipe),
    output:
        model=directory(f"{RUN}/{{parent}}+{{recipe}}/model"),
        step=f"{RUN}/{{parent}}+{{recipe}}/step.json",
    log:
        f"{STUDY.root}/logs/distill_model/{{model}}.s{{seed}}.{{parent}}+{{recipe}}.log",
    benchmark:
        f"{STUDY.root}/benchmarks/distill_model/{{model}}.s{{seed}}.{{parent}}+{{recipe}}.tsv"
    wildcard_constraints:
        recipe=STUDY.rule_pattern("distill_model"),
    conda:
        "../../envs/main.yaml"
    params:
        recipe=lambda w: STUDY.content("recipes", w.recipe),
        code=lambda w: STUDY.code("quantize_model.py", "recipes", w.recipe),
        device=STUDY.config.device,
        gpus=lambda w, resources: STUDY.gpus(resources, workflow.remote_exec),
        study=STUDY.name,
        # As in tune_model: no output, and the shell and tee outlive a SIGTERM that the training saves itself on.
        state=f"{RUN}/{{parent}}+{{recipe}}/training-state",
    shell:
        "trap '' TERM; {params.gpus}python workflow/scripts/quantize_model.py --parent {input.parent}"
        " --recipe {params.recipe:q} --device {params.device} --output {output.model} --step {output.step}"
        " --state {params.state} --study {params.study} --model-name {wildcards.model} --seed {wildcards.seed}"
        " --chain {wildcards.parent}+{wildcards.recipe} --name {wildcards.recipe} 2>&1 | tee {log}"
