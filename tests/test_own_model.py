"""docs/own-model.md is true of a model that the project does not know: its studies, task, numbers and commands."""

from __future__ import annotations

import json
import math
import re
import shlex
from pathlib import Path

import pytest
import yaml

import tiny
from conftest import ROOT, copy_project, snakemake
from espalier import checkpoints, config, sizes
from espalier.checkpoints import Checkpoint
from espalier.evaluate import harness, perplexity
from espalier.study import Study

PAGE = (ROOT / "docs" / "own-model.md").read_text(encoding="utf-8")
YAML = re.findall(r"^```yaml\n(.*?)^```", PAGE, flags=re.M | re.S)
STUDY, TASK, *CHANGED = YAML
ROW = re.search(r'`(\{"question".*?\})`', PAGE, flags=re.S)[1]
# Of the page's model: what its text says of its sizes, and what else its config.json said.
QWEN2 = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 6, "num_attention_heads": 4}
QWEN2 |= {"num_key_value_heads": 2, "vocab_size": 2000, "max_position_embeddings": 512, "tie_word_embeddings": True}


@pytest.fixture(scope="module")
def own(tmp_path_factory) -> Path:
    """A project as a user has it, with the page's study and the folders that it names."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    folder = copy_project(tmp_path_factory.mktemp("own"))
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(**QWEN2, bos_token_id=None, eos_token_id=256, pad_token_id=256))
    model.to(torch.bfloat16).save_pretrained(folder / "your" / "model")
    tiny.tokenizer().save_pretrained(folder / "your" / "model")
    tasks = folder / "your" / "questions" / "tasks"
    tasks.mkdir(parents=True)
    row = json.loads(ROW)
    rows = [row, row | {"choices": row["choices"][::-1], "answer": 1}, row | {"question": "One swallow that never"}]
    for name in ("next-word", "word-order"):
        (tasks / f"{name}.yaml").write_text(TASK.replace("next-word", name))
        write(tasks / f"{name}.jsonl", rows)
    for split in ("calibration", "heldout"):
        write(
            folder / "your" / "texts" / f"{split}.jsonl", [{"text": f"In {split}, a stitch in time saves nine. " * 4}]
        )
    write(folder / "your" / "instructions" / "train.jsonl", [{"prompt": "Why?", "response": "Because."}])
    (folder / "my-study.yaml").write_text(in_place(STUDY, folder))
    return folder


def write(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def in_place(text: str, folder: Path) -> str:
    return text.replace("/path/to/your", str(folder / "your"))


def study_of(folder: Path, name: str) -> Study:
    return Study(config.read(folder / name), file=str(folder / name))


def test_the_study_of_the_page_is_planned_by_its_commands(own):
    commands = re.findall(r"^snakemake (.*?)(?:  +#.*)?$", PAGE, flags=re.M)
    plain = [shlex.split(command) for command in commands]
    assert len(plain) == 3
    assert all(words[-2:] == ["--configfile", "my-study.yaml"] for words in plain)
    targets = {word for words in plain for word in words[:-2] if word not in ("-n", "--quiet", "rules")}
    run = snakemake(own, *targets, "all", "-n", "--quiet", "rules", "--configfile", "my-study.yaml")
    assert run.returncode == 0, run.stdout + run.stderr
    jobs = int(re.search(r"^total +(\d+)$", run.stdout, flags=re.M)[1]) - len(targets) - 1  # targets are rules, too
    assert f"{jobs} jobs" in PAGE


@pytest.mark.parametrize("number", range(len(CHANGED)))
def test_every_other_study_of_the_page_is_valid(own, number):
    file = own / f"changed-{number}.yaml"
    file.write_text(in_place(CHANGED[number], own))
    before, after = study_of(own, "my-study.yaml"), study_of(own, file.name)
    assert after.name == yaml.safe_load(CHANGED[number]).get("study", before.name)
    lost, new = (set(one.raw_results()) - set(other.raw_results()) for one, other in ((before, after), (after, before)))
    assert new
    assert all("+lora" in path for path in new) or after.name != before.name
    assert "Ours + GPTQ" in CHANGED[number] or len(lost) == len(before.raw_results())


def test_the_page_says_how_large_such_a_model_becomes(own):
    """The page's table of sizes is the output of its command for the model that it describes."""
    table = re.search(r"^model +chain.*?(?=^```)", PAGE, flags=re.M | re.S)[0]
    said = {
        chain: int(count.replace(",", "")) for chain, count in re.findall(r"^mine +(\S+) +([\d,]+)", table, flags=re.M)
    }
    counted = {row.chain: row.parameters for row in sizes.of_study(study_of(own, "my-study.yaml"))}
    assert said.items() <= counted.items()
    assert said["dense"] - said["dense+depth-1"] == 64 * (64 + 2 * 32) + 64 + 2 * 32 + 64 * 64 + 3 * 64 * 192 + 2 * 64
    assert f"{said['dense']:,} parameters" in PAGE.replace("\n", " ")


def test_the_page_names_commands_and_keys_that_are_there(own):
    for target in re.findall(r"^make ([a-z-]+)", PAGE, flags=re.M):
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), flags=re.M), target
    scripts = re.findall(r"^python (\S+)", PAGE, flags=re.M)
    assert scripts
    assert all((ROOT / script).is_file() for script in scripts)
    example = study_of(own, "my-study.yaml")
    assert example.mapping["suites"]["heldout"]["bos_first_window"] is False


def test_a_model_without_bos_is_scored_on_own_tasks_and_texts(own, tmp_path):
    """The page's task, and the base's perplexity, against the model's log-probabilities, added up here."""
    study = study_of(own, "my-study.yaml")
    checkpoints.refer(tmp_path, json.loads(study.reference("mine")))
    checkpoint = checkpoints.load(tmp_path, device="cpu")
    assert checkpoint.tokenizer.bos_token_id is None
    own_tasks = study.resolved.suites["zero-shot"].recipe
    measured = harness.measure(checkpoint, own_tasks, seed=0, device="cpu")
    rows = own_tasks.dataset.rows("next-word", "tasks")
    scores = [[log_probability(checkpoint, row["question"], f" {choice}") for choice in row["choices"]] for row in rows]
    right = [int(values.index(max(values)) == row["answer"]) for values, row in zip(scores, rows, strict=True)]
    assert sum(right[:2]) == 2 or sum(right[:2]) == 0  # the same question with its choices exchanged
    assert measured.samples["next-word"]["acc"] == right

    recipe = study.resolved.suites["heldout"].recipe
    (text,) = recipe.text.documents()
    whole = checkpoint.tokenizer(text)["input_ids"][: recipe.window]
    head, rest = (checkpoint.tokenizer.decode(part) for part in (whole[:1], whole[1:]))
    (row,) = perplexity.measure(checkpoint, recipe, seed=0, device="cpu").measurements
    assert row["value"] == pytest.approx(
        math.exp(-log_probability(checkpoint, head, rest) / (len(whole) - 1)), rel=1e-4
    )


def log_probability(checkpoint: Checkpoint, context: str, choice: str) -> float:
    """Return that of the choice's tokens after the context."""
    import torch

    first, whole = (checkpoint.tokenizer(text)["input_ids"] for text in (context, context + choice))
    with torch.no_grad():
        found = checkpoint.model(torch.tensor([whole])).logits[0].float().log_softmax(-1)
    return sum(found[i - 1, whole[i]].item() for i in range(len(first), len(whole)))
