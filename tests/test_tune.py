"""Fine-tuning and LoRA against losses, masks and merges written out by hand, on tiny random models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, BertConfig, BertForMaskedLM, LlamaConfig, LlamaForCausalLM
from transformers import PreTrainedTokenizerFast as Fast

from espalier import checkpoints, glue_tasks, instructions, training
from espalier.data import Dataset
from espalier.errors import UserError
from espalier.evaluate import glue
from espalier.recipes import build
from espalier.token_loss import TokenLoss
from espalier.tune import classify, lora

WORDS = "red green blue robin tulip the is a has wing leaf which color what not good bad yes no ?".split()  # noqa: SIM905
SPECIAL = {"pad_token": "[PAD]", "unk_token": "[UNK]", "bos_token": "<s>", "eos_token": "</s>"}
PAD, BOS, EOS = 0, 2, 3


def word_tokenizer(template: str | None = None, pairs: bool = False) -> Fast:
    """One token a word; `template` says what the tokenizer puts around a text by itself."""
    names = [*SPECIAL.values(), "[CLS]", "[SEP]", *WORDS]
    tokenizer = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    marks = [("<s>", BOS), ("</s>", EOS), ("[CLS]", 4), ("[SEP]", 5)]
    if template:
        tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=marks)
    if pairs:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=marks
        )
    inputs = ["input_ids", "token_type_ids", "attention_mask"] if pairs else ["input_ids", "attention_mask"]
    return Fast(tokenizer_object=tokenizer, model_input_names=inputs, **SPECIAL)


def write(file: Path, rows: list[dict]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def empty(folder: Path) -> Path:
    folder.mkdir()
    return folder


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> Path:
    folder, tokenizer = tmp_path_factory.mktemp("encoder"), word_tokenizer(pairs=True)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = BertForMaskedLM(BertConfig(vocab_size=len(tokenizer), max_position_embeddings=16, **sizes, **dropout))
    info = {"task": "masked-lm", "parameters": checkpoints.logical_parameters(model)}
    checkpoints.save(model, tokenizer, folder, info)
    return folder


def llama(tokenizer: Fast) -> LlamaForCausalLM:
    torch.manual_seed(1)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=64, initializer_range=0.2, **sizes)
    )


@pytest.fixture(scope="module")
def decoder(tmp_path_factory) -> Path:
    folder, tokenizer = tmp_path_factory.mktemp("decoder"), word_tokenizer()
    model = llama(tokenizer)
    info = {"task": "causal-lm", "parameters": checkpoints.logical_parameters(model), "bits": 32}
    checkpoints.save(model, tokenizer, folder, info)
    return folder


@pytest.mark.parametrize("duration", [{}, {"steps": 3, "epochs": 1.0}, {"steps": 0}])
def test_exactly_one_positive_duration(duration):
    dataset = {"name": "d", "source": "local", "path": "d"}
    for module, more in ((classify, {"task": "rte"}), (lora, {})):
        with pytest.raises(UserError, match="'steps'"):
            build(module.Recipe, {"dataset": dataset, **more, **duration}, "recipe")
    assert training.steps_of(10, 4, None, 2) == 6
    assert training.steps_of(10, 4, 5, None) == 5


# Classification -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def benchmark(tmp_path_factory) -> dict:
    """Tasks that a bag of words solves: the label follows from one word."""
    folder = tmp_path_factory.mktemp("benchmark")
    draw = torch.Generator().manual_seed(0)

    def words() -> list[str]:
        return [WORDS[i] for i in torch.randint(12, (int(torch.randint(2, 6, (), generator=draw)),), generator=draw)]

    for split, count in (("train", 96), ("validation", 48)):
        rows = [{"sentence": " ".join([*words(), ("bad", "good")[i % 2]]), "label": i % 2} for i in range(count)]
        write(folder / "glue" / "sst2" / f"{split}.jsonl", rows)
        rows = [
            {
                "sentence1": " ".join(words()),
                "sentence2": " ".join([("no", "not", "yes")[i % 3], *words()]),
                "label": 2.5 * (i % 3),
            }
            for i in range(count)
        ]
        write(folder / "glue" / "stsb" / f"{split}.jsonl", rows)
    return {"name": "words", "source": "demo", "path": str(folder)}


def classify_recipe(benchmark: dict, task: str, **options) -> classify.Recipe:
    values = {"task": task, "dataset": benchmark, "batch_size": 16, "learning_rate": 5.0e-3, **options}
    return build(classify.Recipe, values, "recipe")


@pytest.mark.parametrize(("task", "metric"), [("sst2", "accuracy"), ("stsb", "pearson")])
def test_classifier_learns_and_is_a_checkpoint_for_glue(encoder, benchmark, tmp_path, task, metric):
    recipe = classify_recipe(benchmark, task, epochs=15)
    report = classify.apply(encoder, tmp_path, recipe, seed=0, device="cpu")
    assert (report["rows"], report["steps"]) == (96, 90)
    checkpoint = checkpoints.load(tmp_path, "cpu")
    assert checkpoint.info["glue_task"] == task
    assert checkpoint.info["task"] == "sequence-classification"
    assert checkpoint.info["parameters"] == sum(one.numel() for one in checkpoint.model.parameters())
    measured = glue.measure(
        checkpoint, build(glue.Recipe, {"task": task, "dataset": benchmark}, "s"), seed=0, device="cpu"
    )
    scores = {one["metric"]: one["value"] for one in measured.measurements}
    assert scores[metric] > 0.9


@pytest.mark.parametrize("task", ["sst2", "stsb"])
def test_first_loss_is_that_of_the_first_batch_row_by_row(encoder, benchmark, tmp_path, task):
    recipe = classify_recipe(benchmark, task, steps=1)
    report = classify.apply(encoder, tmp_path, recipe, seed=5, device="cpu")
    torch.manual_seed(5)
    checkpoint = checkpoints.load(encoder, "cpu", classify.GIVES, num_labels=glue_tasks.TASKS[task].labels)
    rows = Dataset(**benchmark).rows("train", f"glue/{task}")
    losses = []
    for i in next(training.batches(96, 16, 1, seed=5)):
        inputs = checkpoint.tokenizer(*(rows[i][one] for one in glue_tasks.TASKS[task].columns), return_tensors="pt")
        logits = checkpoint.model(**inputs).logits[0]
        label = rows[i]["label"]
        losses.append((logits[0] - label) ** 2 if task == "stsb" else -logits.log_softmax(0)[label])
    assert report["losses"] == [pytest.approx(torch.stack(losses).mean().item(), abs=2e-5)]


def test_classifier_follows_from_the_seed(encoder, benchmark, tmp_path):
    weights = []
    for i, seed in enumerate((0, 0, 1)):
        folder = empty(tmp_path / str(i))
        classify.apply(encoder, folder, classify_recipe(benchmark, "sst2", steps=3), seed=seed, device="cpu")
        weights.append((folder / "model.safetensors").read_bytes())
    assert weights[0] == weights[1] != weights[2]


def test_only_matrices_decay(encoder, benchmark):
    model = checkpoints.load(encoder, "cpu", classify.GIVES, num_labels=2).model
    plan = training.plan_of_rows(classify_recipe(benchmark, "sst2", steps=1), 1)
    decayed, free = training.adamw(model.parameters(), 1.0, plan.weight_decay, plan.adam_beta2).param_groups
    assert decayed["betas"] == (0.9, 0.999)
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.01, 0.0)
    assert {one.ndim for one in decayed["params"]} == {2}
    assert {one.ndim for one in free["params"]} == {1}
    assert len(decayed["params"]) + len(free["params"]) == len(list(model.parameters()))


# LoRA -----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def questions(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("questions")
    colors = ("red", "green", "blue")
    rows = [
        {"prompt": f"{noun} {'the ' * i}color ?", "response": f" {colors[(i + j) % 3]}{' yes' * (i % 2)}"}
        for i in range(8)
        for j, noun in enumerate(("robin", "tulip", "leaf"))
    ]
    write(folder / "train.jsonl", rows)
    return {"name": "questions", "source": "local", "path": str(folder)}


def lora_recipe(questions: dict, **options) -> lora.Recipe:
    values = {"dataset": questions, "steps": 4, "batch_size": 6, "validation_samples": 0, "warmup_steps": 0}
    return build(lora.Recipe, {**values, "dropout": 0.0, "learning_rate": 1.0e-2, **options}, "recipe")


def words_of(tokenizer: Fast, item: dict) -> tuple[list[str], list[str]]:
    learned = [label for label in item["labels"] if label != training.UNSEEN]
    return tokenizer.convert_ids_to_tokens(item["input_ids"]), tokenizer.convert_ids_to_tokens(learned)


@pytest.mark.parametrize("template", [None, "<s> $A", "<s> $A </s>"])
def test_only_the_response_and_the_end_are_learned(tmp_path, template):
    write(tmp_path / "train.jsonl", [{"prompt": "robin color ?", "response": "red"}, {"prompt": "", "response": "no"}])
    tokenizer = word_tokenizer(template)
    dataset = {"name": "q", "source": "local", "path": str(tmp_path)}
    items, dropped = instructions.examples(tokenizer, lora_recipe(dataset, separator=" "))
    begin = ["<s>"] if template else []
    assert words_of(tokenizer, items[0]) == ([*begin, "robin", "color", "?", "red", "</s>"], ["red", "</s>"])
    # Without a prompt and a beginning token, the response's first token has nothing to be predicted from.
    assert words_of(tokenizer, items[1]) == ([*begin, "no", "</s>"], ["no", "</s>"] if begin else ["</s>"])
    assert dropped == 0
    items, dropped = instructions.examples(tokenizer, lora_recipe(dataset, separator=" ", cutoff=3 + len(begin)))
    assert dropped == 1, "a response that is cut away entirely must be dropped"
    assert [len(item["input_ids"]) for item in items] == [2 + len(begin)]


def test_alpaca_prompts(tmp_path):
    rows = [{"instruction": "Add.", "input": "1 2", "output": "3"}, {"instruction": "Hi.", "input": "", "output": "Ho"}]
    recipe = lora_recipe({"name": "q", "source": "local", "path": str(tmp_path)}, template="alpaca")
    prompt, response = instructions._pair(rows[0], recipe)
    assert prompt.startswith("Below is an instruction that describes a task, paired with an input that provides")
    assert prompt.endswith("request.\n\n### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n")
    assert response == "3"
    prompt, _ = instructions._pair(rows[1], recipe)
    assert prompt.startswith("Below is an instruction that describes a task. Write a response")
    assert prompt.endswith("request.\n\n### Instruction:\nHi.\n\n### Response:\n")
    write(tmp_path / "train.jsonl", [{"prompt": "a", "response": "b"}])
    with pytest.raises(UserError, match="no column 'instruction'"):
        instructions.examples(word_tokenizer(), recipe)


def token_loss(tokenizer: Fast) -> TokenLoss:
    return TokenLoss(tokenizer.pad_token_id, "cpu", autocast=False)


def fit(model, tokenizer: Fast, train: list[dict], validation: list[dict], recipe: lora.Recipe) -> dict:
    plan = training.plan_of(recipe, recipe.steps)
    rows = training.Rows(train, recipe.batch_size, plan.steps, seed=0)
    options = {"device": "cpu", "label": "steps", "validation": validation}
    return training.fit(model, rows, token_loss(tokenizer), plan, **options)


def test_loss_is_the_mean_over_learned_tokens(questions):
    tokenizer, recipe = word_tokenizer(), lora_recipe(questions)
    model = llama(tokenizer).eval()
    items, _ = instructions.examples(tokenizer, recipe)
    losses = []
    for item in items:
        for position in range(1, len(item["input_ids"])):
            if item["labels"][position] != training.UNSEEN:
                with torch.no_grad():
                    logits = model(input_ids=torch.tensor([item["input_ids"][:position]])).logits[0, -1].double()
                losses.append(-logits.log_softmax(0)[item["input_ids"][position]].item())
    assert len(losses) == 3 * (4 * 2 + 4 * 3)
    assert training.mean_loss(model, items, token_loss(tokenizer), recipe.micro_batch) == pytest.approx(
        sum(losses) / len(losses), rel=1e-5
    )


def test_validation_is_without_dropout_and_leaves_training_on(questions):
    tokenizer, recipe = word_tokenizer(), lora_recipe(questions, dropout=0.5)
    adapted = lora.adapted(llama(tokenizer), recipe, seed=0)
    for name, one in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(one, std=0.5)
    items, _ = instructions.examples(tokenizer, recipe)
    expected = training.mean_loss(adapted.eval(), items, token_loss(tokenizer), recipe.micro_batch)
    assert training.mean_loss(adapted.train(), items, token_loss(tokenizer), recipe.micro_batch) == expected
    assert adapted.training
    assert training.backward(adapted, items, token_loss(tokenizer), recipe.micro_batch) != expected


def test_micro_batches_do_not_change_the_gradient(questions):
    tokenizer = word_tokenizer()
    gradients, losses = [], []
    for size in (1, 4, 24):
        recipe, model = lora_recipe(questions, micro_batch=size), llama(tokenizer)
        items, _ = instructions.examples(tokenizer, recipe)
        losses.append(training.backward(model, items, token_loss(tokenizer), size))
        gradients.append(model.model.layers[0].mlp.up_proj.weight.grad)
    mean = training.mean_loss(llama(tokenizer), items, token_loss(tokenizer), recipe.micro_batch)
    assert losses == [pytest.approx(mean, rel=1e-5)] * 3
    assert gradients[0].abs().max() > 1e-3
    for gradient in gradients[1:]:
        torch.testing.assert_close(gradient, gradients[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("targets", [None, ["q_proj", "down_proj"]])
def test_trained_parameters_are_exactly_the_adapters(questions, targets):
    tokenizer, recipe = word_tokenizer(), lora_recipe(questions, r=4, targets=targets)
    model = llama(tokenizer)
    linear = {name: part for name, part in model.model.layers.named_modules() if isinstance(part, torch.nn.Linear)}
    chosen = [part for name, part in linear.items() if targets is None or name.rpartition(".")[2] in targets]
    assert len(chosen) == (14 if targets is None else 4)
    expected = sum(4 * (part.in_features + part.out_features) for part in chosen)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    adapted = lora.adapted(model, recipe, seed=0)
    trained = {name: one for name, one in adapted.named_parameters() if one.requires_grad}
    assert sum(one.numel() for one in trained.values()) == expected
    start = {name: one.detach().clone() for name, one in trained.items()}
    items, _ = instructions.examples(tokenizer, recipe)
    fit(adapted, tokenizer, items, [], recipe)
    assert all(not torch.equal(one, start[name]) for name, one in trained.items())
    frozen = {
        name.replace(".base_layer", "").removeprefix("base_model.model."): value
        for name, value in adapted.state_dict().items()
        if "lora_" not in name
    }
    assert frozen.keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in frozen.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_gives_the_adapted_model(questions, dtype):
    tokenizer = word_tokenizer()
    base = llama(tokenizer).to(dtype)
    weight = base.model.layers[1].mlp.gate_proj.weight.detach().clone()
    adapted = lora.adapted(base, lora_recipe(questions, r=4, alpha=12.0), seed=0)
    torch.manual_seed(2)
    for name, one in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(one, std=0.2)
    layer = adapted.base_model.model.model.layers[1].mlp.gate_proj
    update = 3.0 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    ids = torch.randint(6, len(tokenizer), (3, 9))
    with torch.no_grad():
        expected = adapted.eval()(input_ids=ids).logits
        with adapted.disable_adapter():
            plain = adapted(input_ids=ids).logits
        merged = lora.merge(adapted)
        found = merged(input_ids=ids).logits
    assert type(merged) is LlamaForCausalLM
    merged_weight = merged.model.layers[1].mlp.gate_proj.weight
    assert merged_weight.dtype is dtype
    # Added in float32 and rounded once.
    exact = (weight.float() + update).to(dtype)
    assert ((merged_weight - exact).abs() > 1e-6).float().mean() < 0.005
    if dtype is torch.float32:
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        assert (expected - plain).abs().max() > 0.1


def test_the_adapter_with_the_lowest_validation_loss_is_kept(questions, monkeypatch):
    tokenizer, recipe = word_tokenizer(), lora_recipe(questions, steps=5, validate_every=1)
    adapted = lora.adapted(llama(tokenizer), recipe, seed=0)
    items, _ = instructions.examples(tokenizer, recipe)
    seen, fake = [], iter([3.0, 2.0, 1.0, 1.5, 1.0])

    def loss(model, *_):
        seen.append([one.detach().clone() for one in model.parameters() if one.requires_grad])
        return next(fake)

    monkeypatch.setattr(training, "mean_loss", loss)
    report = fit(adapted, tokenizer, items[:18], items[18:], recipe)
    assert report["kept_step"] == 3
    assert [one["step"] for one in report["validation"]] == [1, 2, 3, 4, 5]
    kept = [one for one in adapted.parameters() if one.requires_grad]
    assert all(torch.equal(one, third) for one, third in zip(kept, seen[2], strict=True))
    assert not all(torch.equal(third, last) for third, last in zip(seen[2], seen[4], strict=True))


def test_the_last_step_is_validated_and_rows_are_set_apart(questions):
    items, _ = instructions.examples(word_tokenizer(), lora_recipe(questions))
    train, validation = instructions.split_rows(items, 5, seed=0)
    assert (len(train), len(validation)) == (19, 5)
    assert sorted(map(str, train + validation)) == sorted(map(str, items))
    assert validation != instructions.split_rows(items, 5, seed=1)[1]
    with pytest.raises(UserError, match="leaves none to train"):
        instructions.split_rows(items, 24, seed=0)


def test_lora_from_checkpoint_to_checkpoint(decoder, questions, tmp_path):
    options = {"validation_samples": 4, "validate_every": 20, "micro_batch": 2}
    recipe = lora_recipe(questions, steps=30, **options)
    report = lora.apply(decoder, tmp_path, recipe, seed=0, device="cpu")
    assert [one["step"] for one in report["validation"]] == [20, 30]
    assert (report["train_rows"], report["validation_rows"], report["dropped_rows"]) == (20, 4, 0)
    assert sum(report["losses"][-5:]) < 0.5 * sum(report["losses"][:5])
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not any("lora" in name for name in model.state_dict())
    assert checkpoints.describe(tmp_path) == checkpoints.describe(decoder)
    # The saved model has what was trained: the kept adapter's validation loss, on the rows that were set apart.
    items, _ = instructions.examples(word_tokenizer(), recipe)
    _, validation = instructions.split_rows(items, 4, seed=0)
    kept = min(one["loss"] for one in report["validation"])
    assert training.mean_loss(model, validation, token_loss(word_tokenizer()), recipe.micro_batch) == pytest.approx(
        kept, rel=1e-4
    )


def test_lora_in_bfloat16_with_autocast_and_alike_for_one_seed(decoder, questions, tmp_path):
    recipe = lora_recipe(questions, dtype="bfloat16", autocast=True, attention="eager", dropout=0.1)
    weights = []
    for i, seed in enumerate((0, 0, 1)):
        folder = empty(tmp_path / str(i))
        lora.apply(decoder, folder, recipe, seed=seed, device="cpu")
        weights.append((folder / "model.safetensors").read_bytes())
    assert weights[0] == weights[1] != weights[2]
    assert checkpoints.describe(folder)["bits"] == 16
    assert checkpoints.load(folder, "cpu").model.dtype is torch.bfloat16


def test_lora_refuses_what_it_cannot_do(decoder, questions, tmp_path):
    with pytest.raises(UserError, match="Did you mean 'q_proj'"):
        lora.adapted(llama(word_tokenizer()), lora_recipe(questions, targets=["q_porj"]), seed=0)
    checkpoints.write_description(tmp_path, {"task": "causal-lm", "parameters": 1, "format": "bitsandbytes"})
    with pytest.raises(UserError, match="before quantization"):
        lora.apply(tmp_path, tmp_path, lora_recipe(questions), seed=0, device="cpu")
