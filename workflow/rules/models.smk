"""Where chains begin: generated datasets, models that the study trains itself, and pointers to existing models.

In:  nothing but recipes
Out: data/{dataset}/  runs/{model}/s{seed}/dense/model/  runs/{model}/s{seed}/dense/step.json
"""


rule generate_data:
    """Write the demo's language: text, seven zero-shot tasks and eight GLUE tasks."""
    output:
        data=directory(f"{STUDY.root}/data/{{dataset}}"),
    log:
        f"{STUDY.root}/logs/generate_data/{{dataset}}.log",
    benchmark:
        f"{STUDY.root}/benchmarks/generate_data/{{dataset}}.tsv"
    conda:
        "../../envs/main.yaml"
    params:
        recipe=lambda w: STUDY.generated(w.dataset),
        code=STUDY.code("generate_data.py"),
    shell:
        "python workflow/scripts/generate_data.py --recipe {params.recipe:q} --output {output.data} 2>&1 | tee {log}"


rule pretrain_model:
    """Train a small model from scratch."""
    input:
        data=lambda w: STUDY.data("pretrained", w.model),
    output:
        model=directory(f"{RUN}/dense/model"),
        step=f"{RUN}/dense/step.json",
    log:
        f"{STUDY.root}/logs/pretrain_model/{{model}}.s{{seed}}.log",
    benchmark:
        f"{STUDY.root}/benchmarks/pretrain_model/{{model}}.s{{seed}}.tsv"
    wildcard_constraints:
        model=STUDY.pattern(STUDY.resolved.pretrained),
    priority: 10  # everything waits for these
    conda:
        "../../envs/main.yaml"
    params:
        recipe=lambda w: STUDY.content("pretrained", w.model),
        code=lambda w: STUDY.code("pretrain_model.py", "pretrained", w.model),
        device=STUDY.config.device,
        gpus=lambda w, resources: STUDY.gpus(resources, workflow.remote_exec),
        study=STUDY.name,
    shell:
        "{params.gpus}python workflow/scripts/pretrain_model.py --recipe {params.recipe:q} --device {params.device}"
        " --output {output.model} --step {output.step} --study {params.study} --model-name {wildcards.model}"
        " --seed {wildcards.seed} --chain dense --name dense 2>&1 | tee {log}"


rule fetch_model:
    """Point to a model of the hub or of a local folder, once it is known to be there and whole."""
    output:
        model=directory(f"{RUN}/dense/model"),
        step=f"{RUN}/dense/step.json",
    log:
        f"{STUDY.root}/logs/fetch_model/{{model}}.s{{seed}}.log",
    benchmark:
        f"{STUDY.root}/benchmarks/fetch_model/{{model}}.s{{seed}}.tsv"
    wildcard_constraints:
        model=STUDY.pattern(set(STUDY.resolved.models) - set(STUDY.resolved.pretrained)),
    conda:
        "../../envs/main.yaml"
    params:
        reference=lambda w: STUDY.reference(w.model),
        # This depends on a resource, so Snakemake does not count it among the reasons to run a finished job again: the
        # shape only stood for what is there now, and the model and all that follows from it would be made again.
        shape=lambda w, resources: STUDY.shape(w.model),
        code=STUDY.code("fetch_model.py"),
        study=STUDY.name,
    shell:
        "python workflow/scripts/fetch_model.py --reference {params.reference:q} {params.shape} --output {output.model}"
        " --step {output.step} --study {params.study} --model-name {wildcards.model} --seed {wildcards.seed}"
        " --chain dense --name dense 2>&1 | tee {log}"
