"""XTC: students against their teachers, packed students in a new process, interrupted trainings, and bad input."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from conftest import ROOT
from encoder_cases import FAMILIES, batch, checkpoint, dataset, save_logits
from espalier import checkpoints, plugins, training
from espalier.errors import UserError
from espalier.models import latent, packed
from espalier.models.packed import Scheme
from espalier.quantize import xtc
from espalier.recipes import build
from training_runs import SERVER, arguments, report, run, weights

SCRIPT = ROOT / "workflow/scripts/quantize_model.py"
QUICK = {"task": "cola", "steps": 3, "batch_size": 8, "learning_rate": 5.0e-3}
NOT_AT_ALL = {"steps": 1, "learning_rate": 0.0}


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> dict:
    return dataset(tmp_path_factory.mktemp("words"))


@pytest.fixture(scope="module")
def teachers(tmp_path_factory) -> dict[str, Path]:
    """Classifiers of three layers, with dropout, each family's for cola, and one for stsb."""
    folder = tmp_path_factory.mktemp("teachers")
    made = {family: checkpoint(folder / family, family, "cola", layers=3, dropout=0.1) for family in FAMILIES}
    return made | {"stsb": checkpoint(folder / "stsb", "bert", "stsb", labels=1)}


def recipe(words: dict, **options) -> xtc.Recipe:
    keys = plugins.fill(xtc, {"dataset": words, **options}, "recipe")
    return build(xtc.Recipe, keys, "recipe")


def train(parent: Path, output: Path, words: dict, seed: int = 0, **options) -> dict:
    """Train a student into `output`; return what is reported."""
    output.mkdir(parents=True, exist_ok=True)
    return xtc.apply(parent, output, recipe(words, **{**QUICK, **options}), seed=seed, device="cpu")


@torch.no_grad()
def logits(folder: Path) -> torch.Tensor:
    return checkpoints.load(folder, "cpu").model(**batch()).logits


# The beginning --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_student_without_quantization_begins_as_its_teacher(teachers, words, tmp_path, family):
    train(teachers[family], tmp_path, words, bits=32, **NOT_AT_ALL)
    found, expected = (load_file(folder / "model.safetensors") for folder in (tmp_path, teachers[family]))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert torch.equal(logits(tmp_path), logits(teachers[family]))
    info = checkpoints.describe(tmp_path)
    assert (info["format"], info["bits"]) == ("transformers", 32)


def test_a_student_without_quantization_computes_what_its_teacher_computes(teachers, words, tmp_path):
    """A teacher without dropout, and of one output, which leaves no entropy: there is nothing to learn."""
    given = {"task": "stsb", **NOT_AT_ALL}
    assert train(teachers["stsb"], tmp_path, words, bits=32, **given)["losses"] == [0.0]
    assert train(teachers["stsb"], tmp_path, words, bits=2, **given)["losses"][0] > 0.1


@pytest.mark.parametrize("bits", [1, 2, 32])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_student_begins_as_the_layers_that_it_keeps(teachers, words, tmp_path, family, bits):
    """Which layer went where is seen in the biases, which stay as they are, and what is quantized in the codes."""
    kept = [0, 2]
    train(teachers[family], tmp_path, words, bits=bits, layers=kept, **NOT_AT_ALL)
    found, teacher = (load_file(folder / "model.safetensors") for folder in (tmp_path, teachers[family]))
    seen = set()
    for name, value in teacher.items():
        for own, number in enumerate(kept):
            name = name.replace(f"layer.{number}.", f"layer.<{own}>.")
        if "layer.1." in name:
            continue
        name = name.replace("<", "").replace(">", "")
        if f"{name}_packed" not in found:
            assert torch.equal(found[name], value)
            seen.add(name)
            continue
        codes, scale = packed.quantized(value, Scheme(bits))
        assert torch.equal(found[f"{name}_packed"], packed.pack(codes, bits))
        assert torch.equal(found[f"{name}_scale"], scale)
        seen |= {f"{name}_packed", f"{name}_scale"}
    assert seen == found.keys()
    assert len([name for name in seen if name.endswith("_packed")]) == (0 if bits == 32 else 2 * 6 + 1)
    assert checkpoints.load(tmp_path, "cpu").model.config.num_hidden_layers == 2


# Training -------------------------------------------------------------------------------------------------------------


def test_a_student_learns_what_its_teacher_says(teachers, words, tmp_path):
    report = train(teachers["stsb"], tmp_path, words, task="stsb", bits=2, steps=40, batch_size=20)
    losses = report["losses"]
    assert sum(losses[-4:]) < 0.6 * sum(losses[:4])
    assert (report["rows"], report["augmented_rows"], report["steps"]) == (40, 40, 40)


@pytest.mark.parametrize(
    ("duration", "steps"), [({"steps": 3}, 3), ({"epochs": 1, "steps": None}, 10), ({"epochs": 0.5, "steps": None}, 5)]
)
def test_an_epoch_is_a_pass_over_the_rows_and_their_copies(teachers, words, tmp_path, duration, steps, monkeypatch):
    taken = []

    def fit(model, source, objective, plan, **options):
        taken.extend([source.take() for _ in range(plan.steps)])
        return {"losses": [0.0] * plan.steps}

    monkeypatch.setattr(training, "fit", fit)
    report = train(teachers["bert"], tmp_path, words, bits=1, augmentation=1, **duration)
    assert (report["rows"], report["augmented_rows"], report["steps"]) == (40, 80, steps)
    assert [len(items) for items in taken] == [8] * steps
    rows = {tuple(item["inputs"]["input_ids"]) for items in taken for item in items}
    assert len(rows) > 40 or steps < 10


# Another process ------------------------------------------------------------------------------------------------------

STUDENTS = {
    "bert, 1 bit": ("bert", {"bits": 1}),
    "bert, 2 bits": ("bert", {"bits": 2, "scales": "group", "group_size": 8, "layers": [0, 2]}),
    "roberta, 1 bit": ("roberta", {"bits": 1, "scales": "group", "group_size": 16}),
    "roberta, 2 bits": ("roberta", {"bits": 2, "scales": "row"}),
    "distilbert, 1 bit": ("distilbert", {"bits": 1, "scales": "row", "autocast": True}),
    "distilbert, 2 bits": ("distilbert", {"bits": 2, "activations": None}),
    "eager attention": ("bert", {"bits": 1, "attention": "eager"}),
}


@pytest.fixture(scope="module")
def students(tmp_path_factory, teachers, words) -> dict[str, Path]:
    """All of `STUDENTS`, trained; beside each what the model said when its training was done, before it was packed."""
    folder, said, pack = tmp_path_factory.mktemp("students"), [], latent.pack_latent

    @torch.no_grad()
    def listening(model) -> None:
        assert not model.training
        said.append(model(**batch()).logits)
        pack(model)

    folders = {name: folder / str(number) for number, name in enumerate(STUDENTS)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(latent, "pack_latent", listening)
        for name, (family, options) in STUDENTS.items():
            train(teachers[family], folders[name], words, **options)
            torch.save(said.pop(), folders[name] / "said.pt")
    return folders


@pytest.fixture(scope="module")
def said_elsewhere(students, tmp_path_factory) -> dict[str, torch.Tensor]:
    """What the stored students say in a process that has not seen them made."""
    file = tmp_path_factory.mktemp("said") / "logits.pt"
    # The sums of attention in float32 are rounded as its implementation orders them.
    attention = [options.get("attention", "sdpa") for _, options in STUDENTS.values()]
    cases = [
        (str(folder), {"attn_implementation": one}) for folder, one in zip(students.values(), attention, strict=True)
    ]
    process = SERVER.Process(target=save_logits, args=(cases, str(file), torch.get_num_threads()))
    process.start()
    process.join(120)
    assert process.exitcode == 0
    return dict(zip(students, torch.load(file), strict=True))


@pytest.mark.parametrize("name", STUDENTS)
def test_a_packed_student_scores_exactly_what_it_scored_in_training(students, said_elsewhere, teachers, name):
    said = torch.load(students[name] / "said.pt")
    assert torch.equal(said_elsewhere[name], said)
    assert not torch.allclose(said, logits(teachers[STUDENTS[name][0]]), atol=0.01)


@pytest.mark.parametrize("name", STUDENTS)
def test_what_a_checkpoint_says_of_itself(students, teachers, name):
    family, options = STUDENTS[name]
    folder, removed = students[name], 0
    teacher = checkpoints.load(teachers[family], "cpu").model
    if "layers" in options:
        removed = sum(one.numel() for key, one in teacher.named_parameters() if "layer.1." in key)
    assert checkpoints.describe(folder) == {
        "task": "sequence-classification",
        "glue_task": "cola",
        "parameters": sum(one.numel() for one in teacher.parameters()) - removed,
        "format": "packed",
        "bits": options["bits"],
        "dtype": "float32",
        "arithmetic": "integer" if options.get("activations", 8) else "unpacked",
    }
    assert json.loads((folder / "config.json").read_text())["quantization_config"] == {
        "quant_method": "espalier-packed",
        "bits": options["bits"],
        "scales": options.get("scales", "tensor"),
        "group_size": options.get("group_size", -1),
        "activations": options.get("activations", 8),
    }


@pytest.mark.parametrize("name", STUDENTS)
def test_a_checkpoint_is_as_small_on_disk_and_in_memory_as_its_bits(students, name):
    folder, bits = students[name], STUDENTS[name][1]["bits"]
    stored = load_file(folder / "model.safetensors")
    model = checkpoints.load(folder, "cpu").model
    assert sum(one.nbytes for one in model.state_dict().values()) == sum(one.nbytes for one in stored.values())
    for part, value in stored.items():
        if part.endswith("_packed"):
            rows, columns = (
                value.shape[0],
                48 if part.endswith(("output.dense.weight_packed", "lin2.weight_packed")) else 32,
            )
            columns = 32 if "attention.output" in part else columns
            assert (value.dtype, value.nbytes) == (torch.uint8, rows * columns * bits // 8)
        else:
            assert value.dtype == torch.float32
    header = int.from_bytes((folder / "model.safetensors").read_bytes()[:8], "little")
    assert checkpoints.weight_bytes(folder) == 8 + header + sum(one.nbytes for one in stored.values())


# Again, and after an interruption -------------------------------------------------------------------------------------

RESUMED = {**QUICK, "steps": 6, "bits": 1, "augmentation": 1}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, teachers, words) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted")
    code, said = run(command(teachers, words, folder), folder / "log", script=SCRIPT)
    assert code == 0, said
    return folder


def command(teachers, words, folder: Path) -> list[str]:
    return arguments(teachers["bert"], {"quantize": "xtc", "dataset": words, **RESUMED}, folder, "--save-every", "0")


def test_the_seed_decides_every_byte(teachers, words, uninterrupted, tmp_path):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for seed in (0, 1):
        train(teachers["bert"], tmp_path / str(seed) / "model", words, seed=seed, **RESUMED)
        assert torch.initial_seed() == seed, "dropout follows it as the rows do"
    torch.set_num_threads(threads)
    assert weights(tmp_path / "0") == weights(uninterrupted) != weights(tmp_path / "1")


@pytest.mark.parametrize(
    ("kill", "code", "last"),
    [(("during", 4), -signal.SIGKILL, 3), (("asked", 2), 1, 3)],
    ids=["killed", "asked to stop"],
)
def test_a_training_that_was_interrupted_goes_on_to_the_same_bytes(
    teachers, words, uninterrupted, tmp_path, kill, code, last
):
    given = command(teachers, words, tmp_path)
    found, said = run(given, tmp_path / "log", kill=kill, script=SCRIPT)
    assert found == code, said
    assert ("Stopped by SIGTERM after step 3 of 6" in said) is (code == 1)
    assert not (tmp_path / "model").exists()
    found, said = run(given, tmp_path / "log", script=SCRIPT)
    assert found == 0, said
    assert f"going on after step {last}," in said
    assert weights(tmp_path) == weights(uninterrupted)
    assert {**report(tmp_path), "seconds": 0} == {**report(uninterrupted), "seconds": 0}
    assert not (tmp_path / "state").exists()


# Bad input ------------------------------------------------------------------------------------------------------------

REFUSED = {
    "a teacher with more labels": ("bert", {"labels": 3}, {}, "gives 3 outputs, but GLUE task cola needs 2"),
    "a teacher of another task": ("bert", {"task": "rte"}, {}, "was trained for GLUE task rte, not for cola"),
    "a layer that is not there": ("bert", {"layers": 2}, {"layers": [0, 2]}, "0 to 1: there is no layer 2"),
    "groups that do not divide": (
        "bert",
        {},
        {"scales": "group", "group_size": 24},
        "has 32 input channels, which groups of 24 (the key 'group_size') do not divide",
    ),
    "groups that divide the width but not the neurons": (
        "bert",
        {},
        {"scales": "group", "group_size": 32},
        "has 48 input channels, which groups of 32",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_teacher_that_cannot_have_the_student_is_refused_before_training(words, tmp_path, monkeypatch, name):
    family, teacher, options, message = REFUSED[name]
    monkeypatch.setattr(training, "fit", lambda *_, **__: pytest.fail("trained"))
    parent = checkpoint(tmp_path / "teacher", family, **teacher)
    with pytest.raises(UserError) as caught:
        train(parent, tmp_path / "student", words, bits=1, **options)
    assert message in str(caught.value)


def test_a_packed_parent_is_refused(students, words, tmp_path):
    with pytest.raises(UserError, match=r"has packed weights \(packed\), which the training of a student"):
        train(students["bert, 1 bit"], tmp_path, words, bits=1)


def test_another_architecture_is_refused(words, tmp_path):
    from transformers import ElectraConfig, ElectraForSequenceClassification

    from encoder_cases import tokenizer

    sizes = {"embedding_size": 32, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = ElectraForSequenceClassification(ElectraConfig(vocab_size=107, intermediate_size=32, **sizes))
    checkpoints.save(model, tokenizer("bert"), tmp_path, {"task": "sequence-classification", "parameters": 1})
    with pytest.raises(UserError, match="of the type 'electra' is not known; bert, roberta, distilbert are"):
        train(tmp_path, tmp_path / "student", words, bits=1)


WRONG = {
    "3 bits": ({"bits": 3}, "recipe.bits: 3 (int) is not a choice"),
    "16 bits of activations": ({"activations": 16}, "recipe.activations: 16 (int) is not a choice"),
    "a misspelt task": ({"task": "colla"}, "Did you mean 'cola'?"),
    "a misspelt key": ({"layer": [1]}, "unknown key 'layer'. Did you mean 'layers'?"),
    "a preset that is none": ({"preset": "budget-d-cola"}, "there is no preset 'budget-d-cola'. Did you mean 'budget-"),
    "a preset of another task": ({"preset": "budget-a-rte"}, "recipe.task: the preset 'budget-a-rte' is for rte, not"),
    "a preset and steps": ({"preset": "budget-a-cola"}, "exactly one of 'steps' and 'epochs'"),
    "no duration": ({"steps": None}, "exactly one of 'steps' and 'epochs'"),
    "groups without a size": ({"scales": "group"}, "'group_size' goes with 'scales: group'"),
    "a size without groups": ({"group_size": 8}, "'group_size' goes with 'scales: group'"),
    "groups of none": ({"scales": "group", "group_size": 0}, "'group_size' goes with 'scales: group'"),
    "layers in another order": ({"layers": [2, 0]}, "in rising order"),
    "a layer twice": ({"layers": [1, 1]}, "in rising order"),
    "no layer": ({"layers": []}, "at least one"),
    "a negative layer": ({"layers": [-1, 0]}, "'layers' count from 0"),
    "fewer than no copies": ({"augmentation": -1}, "'augmentation' at least 0"),
    "a batch of none": ({"batch_size": 0}, "'batch_size' must be at least 1"),
    "a warm-up of all steps": ({"warmup": 1.0}, "'warmup' is a share of the steps"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_recipe_is_refused(words, name):
    options, message = WRONG[name]
    with pytest.raises(UserError) as caught:
        recipe(words, **{**QUICK, "bits": 1, **options})
    assert message in str(caught.value)


def test_the_training_is_the_recipes(teachers, words, tmp_path, monkeypatch):
    seen = {}

    def fit(model, source, objective, plan, **options):
        lengths = [len(one["inputs"]["input_ids"]) for one in source.items]
        seen.update(plan=plan, autocast=objective.autocast, longest=max(lengths))
        return {"losses": [0.0]}

    monkeypatch.setattr(training, "fit", fit)
    own = {"warmup": 0.3, "weight_decay": 0.2, "adam_beta2": 0.9, "max_gradient_norm": 0.5}
    shape = {"steps": 10, "batch_size": 4, "learning_rate": 0.1, "max_length": 5, "autocast": True}
    train(teachers["bert"], tmp_path / "made", words, bits=1, **own, **shape)
    plan = training.Plan(
        steps=10, learning_rate=0.1, warmup=3, weight_decay=0.2, max_gradient_norm=0.5, micro_batch=4, adam_beta2=0.9
    )
    assert seen == {"plan": plan, "autocast": True, "longest": 5}
    with pytest.raises(UserError, match="trian"):
        train(teachers["bert"], tmp_path / "none", words, bits=1, split="trian")


def test_state_is_for_methods_that_train(teachers, tmp_path):
    words = arguments(teachers["bert"], {"quantize": "bitsandbytes", "bits": 4}, tmp_path / "made")
    status, said = run(words, tmp_path / "log", script=SCRIPT)
    assert status == 1
    assert "--state is for methods that train what they quantize, and bitsandbytes does not" in said


# The budgets that docs/xtc.md lists, in epochs, A, B and C.
BUDGETS = {"qqp mnli": (3, 9, 18), "qnli": (1, 3, 6), "sst2 stsb rte cola mrpc": (1, 3, 12)}


@pytest.mark.parametrize("tasks", BUDGETS)
def test_presets_are_the_budgets_that_the_documentation_lists(words, tasks):
    for task in tasks.split():
        for budget, epochs in zip("abc", BUDGETS[tasks], strict=True):
            found = recipe(words, task=task, bits=1, preset=f"budget-{budget}-{task}")
            assert (found.epochs, found.steps) == (epochs, None)
            assert (found.augmentation > 0) is (task not in ("mnli", "qqp"))
            settings = (found.batch_size, found.learning_rate, found.weight_decay, found.max_length)
            assert settings == (32, 5e-5, 0.01, 128)
    own = recipe(words, task="cola", bits=1, preset="budget-c-cola", epochs=2, augmentation=0)
    assert (own.epochs, own.augmentation) == (2, 0)
