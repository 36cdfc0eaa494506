"""The lm-evaluation-harness definitions of the seven tasks: the same forms and metrics as the harness's own tasks.

Prompts, choices and targets are written as the harness's files write them; where those call a Python function
(HellaSwag, WinoGrande) the same text is made by a template. `data_files` names a file beside the YAML; whoever loads
the task must make that path absolute.
"""

from __future__ import annotations

FORMS = {
    "boolq": r"""
doc_to_text: "{{passage}}\nQuestion: {{question}}?\nAnswer:"
doc_to_target: label
doc_to_choice: ["no", "yes"]
""",
    "piqa": r"""
doc_to_text: "Question: {{goal}}\nAnswer:"
doc_to_target: label
doc_to_choice: "{{[sol1, sol2]}}"
""",
    "hellaswag": r"""
doc_to_text: "{{activity_label}}: {{ctx_a}} {{ctx_b.capitalize()}}"
doc_to_target: "{{label}}"
doc_to_choice: endings
""",
    "winogrande": r"""
doc_to_text: "{{(answer|int) - 1}}"
doc_to_target: "{{sentence.split('_')[1].strip()}}"
doc_to_choice: "{{[sentence.split('_')[0] + option1, sentence.split('_')[0] + option2]}}"
""",
    "arc_easy": r"""
doc_to_text: "Question: {{question}}\nAnswer:"
doc_to_target: "{{choices.label.index(answerKey)}}"
doc_to_choice: "{{choices.text}}"
""",
    "openbookqa": r"""
doc_to_text: question_stem
doc_to_target: "{{choices.label.index(answerKey.lstrip())}}"
doc_to_choice: "{{choices.text}}"
""",
}
FORMS["arc_challenge"] = FORMS["arc_easy"]
WITHOUT_ACC_NORM = ("boolq", "winogrande")


def task_yaml(task: str) -> str:
    """The YAML text of one task; its only split is `validation`."""
    metrics = ["acc"] if task in WITHOUT_ACC_NORM else ["acc", "acc_norm"]
    lines = [f"  - metric: {metric}\n    aggregation: mean\n    higher_is_better: true\n" for metric in metrics]
    return (
        f"task: {task}\n"
        "dataset_path: json\n"
        f"dataset_kwargs:\n  data_files:\n    validation: {task}.jsonl\n"
        "validation_split: validation\n"
        "output_type: multiple_choice\n"
        f"{FORMS[task].lstrip()}"
        f"metric_list:\n{''.join(lines)}"
        "metadata:\n  version: 1.0\n"
    )
