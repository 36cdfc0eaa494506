"""Evaluate: a model is scored on tasks or text.

In:  {chain}/model/
Out: {chain}/evaluate/{suite}.json
"""


rule evaluate_model:
    """Score a model on a suite."""
    input:
        model=f"{RUN}/{{chain}}/model",
        data=lambda w: STUDY.data("suites", w.suite),
    output:
        result=f"{RUN}/{{chain}}/evaluate/{{suite}}.json",
    log:
        f"{STUDY.root}/logs/evaluate_model/{{model}}.s{{seed}}.{{chain}}.{{suite}}.log",
    benchmark:
        f"{STUDY.root}/benchmarks/evaluate_model/{{model}}.s{{seed}}.{{chain}}.{{suite}}.tsv"
    conda:
        "../../envs/main.yaml"
    params:
        recipe=lambda w: STUDY.content("suites", w.suite),
        code=lambda w: STUDY.code("evaluate_model.py", "suites", w.suite),
        commits=lambda w: hub.commits(STUDY, "suites", w.suite),
        device=STUDY.config.device,
        gpus=lambda w, resources: STUDY.gpus(resources, workflow.remote_exec),
        study=STUDY.name,
    shell:
        "{params.gpus}python workflow/scripts/evaluate_model.py --model {input.model} --recipe {params.recipe:q}"
        " --device {params.device} --output {output.result} --study {params.study} --model-name {wildcards.model}"
        " --seed {wildcards.seed} --chain {wildcards.chain} --name {wildcards.suite} 2>&1 | tee {log}"
