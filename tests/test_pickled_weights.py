"""Weights in PyTorch's own format, converted: the same bits, and nothing in the files is run."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSequenceClassification

import families
import tiny
from espalier import checkpoints, config, hub, hub_download, needs, pickled_weights, planning
from espalier.errors import UserError
from espalier.planned_jobs import Job
from hub_server import Fault, serve
from hub_study import model_files, study, use_hub

LOADERS = {
    "causal-lm": AutoModelForCausalLM,
    "masked-lm": AutoModelForMaskedLM,
    "sequence-classification": AutoModelForSequenceClassification,
}


def bert(loader, **options):
    sizes = {"vocab_size": families.VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    torch.manual_seed(0)
    sizes |= {"num_attention_heads": 4, "max_position_embeddings": 64, "initializer_range": 0.2}
    return loader.from_config(AutoConfig.for_model("bert", **sizes | options)).eval()


MODELS = {
    "llama, untied, in 16 bits": ("causal-lm", lambda: families.tiny("llama", dtype=torch.bfloat16)),
    "opt, tied": ("causal-lm", lambda: families.tiny("opt")),
    "bert, tied": ("masked-lm", lambda: bert(AutoModelForMaskedLM)),
    "bert, a classifier": ("sequence-classification", lambda: bert(AutoModelForSequenceClassification, num_labels=3)),
}


def saved(model, folder: Path, files: int = 1, **options) -> Path:
    """Save a model as old versions of transformers did: `files` pickles, and an index if they are several."""
    folder.mkdir()
    model.config.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    state = model.state_dict()
    if files == 1:
        torch.save(state, folder / "pytorch_model.bin", **options)
        return folder
    places = {}
    for number in range(files):
        name = f"pytorch_model-{number + 1:05}-of-{files:05}.bin"
        part = {key: state[key] for i, key in enumerate(state) if i * files // len(state) == number}
        torch.save(part, folder / name, **options)
        places |= dict.fromkeys(part, name)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder


def convert(source: Path, folder: Path, task: str = "causal-lm", **changes) -> dict:
    folder.mkdir()
    reference = {"path": str(source), "id": None, "revision": None, "task": task, "dtype": "auto"}
    return checkpoints.refer(folder, {**reference, "trust_remote_code": False, "convert": True, **changes})


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(1, 12)[None]).logits


LAYOUTS = {"whole": {}, "in two files": {"files": 2}, "before PyTorch 1.6": {"_use_new_zipfile_serialization": False}}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", MODELS)
def test_a_converted_model_is_the_same_bit_by_bit(tmp_path, name, layout):
    task, make = MODELS[name]
    model = make()
    source = saved(model, tmp_path / "source", **LAYOUTS[layout])
    report = convert(source, tmp_path / "converted", task)
    pickles = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in source.glob("*.bin")}
    assert report == {"sha256": pickles}
    info = checkpoints.describe(tmp_path / "converted")
    count = sum(one.numel() for one in model.parameters())
    assert (info["format"], info["parameters"], info["bits"]) == ("transformers", count, 8 * model.dtype.itemsize)
    ours = checkpoints.load(tmp_path / "converted", "cpu").model
    theirs = LOADERS[task].from_pretrained(tmp_path / "converted", local_files_only=True, dtype="auto").eval()
    for found in (ours, theirs):
        assert {key: one.dtype for key, one in found.state_dict().items()} == {
            key: one.dtype for key, one in model.state_dict().items()
        }
        assert all(torch.equal(one, model.state_dict()[key]) for key, one in found.state_dict().items())
        # Where a weight lies in memory decides how a product is rounded.
        torch.testing.assert_close(logits(found), logits(model), rtol=0, atol=1e-6)
    if LAYOUTS[layout].get("files", 1) == 1:  # each tied matrix once; of several files each may hold it
        stored = sum(one.numel() for one in load_file(tmp_path / "converted/model.safetensors").values())
        assert stored == count


def test_names_of_old_versions_are_understood(tmp_path):
    """Of norms in BERT, and of an OPT that was saved without its head; both are as the hub has them."""
    old = {
        "bert": lambda key: key.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ),
        "opt": lambda key: key.removeprefix("model."),
    }
    for name, task, model in (
        ("bert", "masked-lm", bert(AutoModelForMaskedLM)),
        ("opt", "causal-lm", families.tiny("opt")),
    ):
        source = saved(model, tmp_path / name)
        state = {old[name](key): one for key, one in model.state_dict().items() if key != "lm_head.weight"}
        assert not state.keys() & {"model.decoder.embed_tokens.weight", "bert.embeddings.LayerNorm.weight"}
        torch.save(state, source / "pytorch_model.bin")
        convert(source, tmp_path / f"{name}-converted", task)
        found = checkpoints.load(tmp_path / f"{name}-converted", "cpu").model
        torch.testing.assert_close(logits(found), logits(model), rtol=0, atol=1e-6)


def test_several_files_are_written_of_a_large_one(tmp_path, monkeypatch):
    model = families.tiny("opt")
    monkeypatch.setattr(pickled_weights, "LARGEST", 20_000)
    convert(saved(model, tmp_path / "source"), tmp_path / "converted")
    files = sorted((tmp_path / "converted").glob("*.safetensors"))
    parts = [load_file(file) for file in files]
    count = len(files)
    assert [file.name for file in files] == [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
    assert len(files) > 2
    assert all(sum(one.nbytes for one in part.values()) <= 20_000 for part in parts)
    index = json.loads((tmp_path / "converted/model.safetensors.index.json").read_text())
    assert index["weight_map"] == {key: file.name for file, part in zip(files, parts, strict=True) for key in part}
    assert index["metadata"]["total_size"] == sum(4 * one.numel() for one in model.parameters())
    assert torch.equal(logits(checkpoints.load(tmp_path / "converted", "cpu").model), logits(model))


def test_slices_and_names_of_one_tensor_get_values_of_their_own(tmp_path):
    """A model that is not tied may still have been saved with names of one tensor, with rows of one, or transposed."""
    torch.manual_seed(0)
    both = torch.randn(4, 3)
    state = {"up": both[:2], "down": both[2:], "turned": both.T, "one": both, "other": both}
    torch.save(state, tmp_path / "pytorch_model.bin")
    pickled_weights.convert([tmp_path / "pytorch_model.bin"], tmp_path, tied=False)
    found = load_file(tmp_path / "model.safetensors")
    assert set(found) == set(state)
    assert all(torch.equal(found[key], state[key]) for key in state)


def test_what_lies_beside_the_weights_is_taken_if_it_is_safe(tmp_path):
    source = saved(families.tiny("llama"), tmp_path / "source", files=2)
    for name in ("modeling.py", "training_args.bin", "optimizer.pt", "notes.txt", "vocabulary.model", "chat.jinja"):
        (source / name).write_text("x")
    safe = {"config.json", "tokenizer.json", "tokenizer_config.json", "notes.txt", "vocabulary.model", "chat.jinja"}
    made = {"espalier.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"}
    made.add("model.safetensors.index.json")
    convert(source, tmp_path / "converted")
    assert {file.name for file in (tmp_path / "converted").iterdir()} == safe | made
    convert(source, tmp_path / "trusted", trust_remote_code=True)
    assert {file.name for file in (tmp_path / "trusted").iterdir()} == safe | made | {"modeling.py"}


# What is refused -----------------------------------------------------------------------------------------------------


class Call:
    """What a pickle runs when it is loaded without care."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("archive", [True, False], ids=["now", "before PyTorch 1.6"])
def test_code_in_a_pickle_is_refused_and_not_run(tmp_path, archive):
    source, marker = saved(families.tiny("llama"), tmp_path / "source"), tmp_path / "marker"
    state = torch.load(source / "pytorch_model.bin") | {"model.more": Call(marker)}
    torch.save(state, source / "pytorch_model.bin", _use_new_zipfile_serialization=archive)
    with pytest.raises(UserError, match=r"pytorch_model.bin is refused, and nothing in it was run: .* posix.system\.$"):
        convert(source, tmp_path / "converted")
    assert not marker.exists()
    torch.load(source / "pytorch_model.bin", weights_only=False)
    assert marker.exists(), "else this test would show nothing"


def truncate(folder: Path) -> None:
    file = folder / "pytorch_model-00002-of-00002.bin"
    file.write_bytes(file.read_bytes()[:-1000])


def name_elsewhere(folder: Path) -> None:
    (folder / "pytorch_model.bin.index.json").write_text('{"weight_map": {"w": "../pytorch_model-1.bin"}}')


def add(value: object):
    return lambda folder: torch.save({"w": value}, folder / "pytorch_model.bin")


DAMAGE = {
    "truncated": (truncate, r"pytorch_model-00002-of-00002.bin is damaged, or holds no weights: .*\w\.$"),
    "garbage": (lambda folder: (folder / "pytorch_model.bin").write_bytes(b"x" * 99), "pytorch_model.bin is damaged"),
    "empty": (lambda folder: (folder / "pytorch_model.bin").touch(), r"is damaged, or holds no weights: .*\w\.$"),
    "a part that lacks": (
        lambda folder: (folder / "pytorch_model-00001-of-00002.bin").unlink(),
        r"lacks the file pytorch_model-00001-of-00002.bin, which its pytorch_model.bin.index.json names",
    ),
    "a part elsewhere": (name_elsewhere, r"names the file '../pytorch_model-1.bin', which is no part of"),
    "no index": (
        lambda folder: (folder / "pytorch_model.bin.index.json").write_text("{}"),
        "does not say which file holds which weight",
    ),
    "a number": (add(3), "holds more than weights: 'w' is no plain tensor"),
    "a sparse matrix": (add(torch.eye(3).to_sparse()), "holds more than weights: 'w' is no plain tensor"),
    "no names": (lambda folder: torch.save(torch.ones(3), folder / "pytorch_model.bin"), "no weights by name, but a"),
    "safetensors too": (lambda folder: (folder / "model.safetensors").touch(), "leave out the key 'convert'"),
    "neither": (
        lambda folder: [file.unlink() for file in folder.glob("*.bin")],
        r"has neither safetensors weights nor pytorch_model\*.bin",
    ),
}


@pytest.fixture(scope="module")
def opt(tmp_path_factory) -> dict[str, bytes]:
    """The files of a model in two parts."""
    folder = saved(families.tiny("opt"), tmp_path_factory.mktemp("opt") / "model", files=2)
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def write(files: dict[str, bytes], folder: Path) -> Path:
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_one_sentence(tmp_path, opt, damage):
    break_it, message = DAMAGE[damage]
    source = write(opt, tmp_path / "source")
    break_it(source)
    with pytest.raises(UserError, match=message) as caught:
        convert(source, tmp_path / "converted")
    assert "\n" not in str(caught.value)


def test_without_the_key_the_model_is_refused_and_the_key_named(tmp_path, opt):
    with pytest.raises(UserError, match=r"no safetensors weights; .* `convert: true` in the model's entry"):
        convert(write(opt, tmp_path / "source"), tmp_path / "pointer", convert=False)


def test_the_key_is_for_models_that_exist_already():
    with pytest.raises(ValueError, match="'convert' is for a model of the hub or of a path"):
        config.Model(pretrain="demo-decoder", convert=True).check()


# From the hub --------------------------------------------------------------------------------------------------------


@pytest.fixture
def client(monkeypatch, tmp_path):
    """A hub, which this process's own huggingface_hub asks."""
    with serve() as server:
        use_hub(monkeypatch, server, tmp_path / "cache")
        yield server


BESIDE = {"optimizer.pt": b"o", "training_args.bin": b"t", "tf_model.h5": b"h", "pytorch_model.bin.old/x.bin": b"x"}


def test_a_model_of_the_hub_is_converted_with_and_without_the_hub(client, opt, tmp_path, monkeypatch):
    revision = client.add("models", "someone/old", opt | BESIDE)
    where = {"path": None, "id": "someone/old", "revision": revision}
    report = convert(None, tmp_path / "online", **where)
    pickles = {name: hashlib.sha256(opt[name]).hexdigest() for name in opt if name.endswith(".bin")}
    assert report == {"sha256": pickles}
    assert {path.rpartition("/")[2] for path in client.downloads()} == set(opt)
    info = checkpoints.describe(tmp_path / "online")
    assert (info["id"], info["revision"], info["format"]) == ("someone/old", revision, "transformers")

    use_hub(monkeypatch, client, tmp_path / "other")
    client.asked.clear()
    commits = {"tiny": revision, "words": "b" * 40}
    model = {"hub": "someone/old", "revision": revision}
    of = study(tmp_path, commits, models={"m": model | {"convert": True}})
    (item,) = [one for one in hub.needed(of) if one.kind == "model"]
    manifest = hub_download.prefetch("s", [item], hub.manifest_file(of))
    assert {Path(one["path"]).name for one in manifest["items"][0]["files"]} == set(opt)
    assert {path.rpartition("/")[2] for path in client.downloads()} == set(opt)
    monkeypatch.setattr(hub, "needed", lambda of: [item])
    hub.check(of)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    client.asked.clear()
    assert convert(None, tmp_path / "offline", **where) == report
    assert client.asked == []
    assert torch.equal(logits(checkpoints.load(tmp_path / "offline", "cpu").model), logits(families.tiny("opt")))


@pytest.mark.parametrize("status", ["503", "429", "401"])
def test_a_whole_cache_is_converted_while_the_hub_is_ill(client, opt, tmp_path, status):
    where = {"path": None, "id": "someone/old", "revision": client.add("models", "someone/old", opt)}
    report = convert(None, tmp_path / "well", **where)
    client.faults += [Fault("/", status, method=method) for method in ("GET", "HEAD")]
    client.asked.clear()
    assert convert(None, tmp_path / "ill", **where) == report
    assert client.asked, "it was asked in vain"
    shutil.rmtree(tmp_path / "cache")
    with pytest.raises(UserError, match=r"The model someone/old, .* cannot be downloaded: .*\.$"):
        convert(None, tmp_path / "lacking", **where)


def test_a_prefetch_without_the_key_does_not_do_for_a_study_with_it(client, tmp_path, monkeypatch):
    revision = client.add("models", "someone/tiny", model_files(tmp_path / "model"))
    model = {"hub": "someone/tiny", "revision": revision}
    commits = {"tiny": revision, "words": "b" * 40}
    of = study(tmp_path, commits, models={"m": model})
    plain, converted = (hub.Item("model", "someone/tiny", None, revision, convert=key) for key in (False, True))
    hub_download.prefetch("s", [plain], hub.manifest_file(of))
    monkeypatch.setattr(hub, "needed", lambda of: [converted])
    with pytest.raises(UserError, match="prefetched at another revision, config or choice of files only"):
        hub.check(of)


HUB = {
    "safetensors are there": (
        {"model.safetensors": b"s"},
        True,
        "has safetensors weights: leave out the key 'convert'",
    ),
    "nothing is there": ({"weights.bin": b"s"}, True, r"has neither safetensors weights nor pytorch_model\*.bin"),
    "the key lacks": ({}, False, r"has no safetensors weights; .* `convert: true` in the model's entry"),
}


@pytest.mark.parametrize("case", HUB)
def test_what_the_hub_has_is_said_before_a_download(client, opt, tmp_path, case):
    more, key, message = HUB[case]
    files = more if case == "nothing is there" else opt | more
    revision = client.add("models", "someone/old", files, token=None)
    with pytest.raises(UserError, match=message):
        hub_download.prefetch("s", [hub.Item("model", "someone/old", None, revision, convert=key)], tmp_path / "p.json")
    assert client.downloads() == []
    if key:
        with pytest.raises(UserError, match=message):
            convert(None, tmp_path / "converted", path=None, id="someone/old", revision=revision)
        assert client.downloads() == []


def test_a_plan_knows_the_size_of_what_is_converted(tmp_path, opt):
    """Before the fetch as the shape says, or not at all; then from what was written."""
    shaped = {"hub": "someone/old", "revision": "a" * 40, "shape": "tinyllama-1.1b"}
    local = {"path": str(write(opt, tmp_path / "source")), "convert": True}
    models = {"mine": local, "old": shaped | {"convert": True}, "new": shaped}
    measure = [{"model": name, "chains": ["dense"], "suites": ["held"]} for name in models]
    commits = {"tiny": "a" * 40, "words": "b" * 40}
    of = study(tmp_path, commits, models=models, measure=measure)
    folders = {name: tmp_path / f"results/s/runs/{name}/s0/dense/model" for name in models}
    jobs = {
        name: Job(0, "fetch_model", {"model": name, "seed": "0"}, [str(folder)], None, True, "", 1, 0, False, [])
        for name, folder in folders.items()
    }
    each = 2 * 1_100_048_384
    assert planning.disk(of, jobs["old"]).value == 2 * each, "downloaded, and written once more"
    assert planning.disk(of, jobs["new"]).value == each
    model = families.tiny("opt")
    count = sum(one.numel() for one in model.parameters())
    assert planning.disk(of, jobs["mine"]).value == 2 * count, "its config.json is there"
    folders["mine"].parent.mkdir(parents=True)
    convert(tmp_path / "source", folders["mine"])
    count += model.lm_head.weight.numel()  # of two files each holds the tied matrix
    assert needs.size(of, "mine") == needs.Size(count, 4 * count, "weight files")
    folders["old"].parent.mkdir(parents=True)
    folders["mine"].rename(folders["old"])
    assert needs.size(of, "old") == needs.Size(count, 4 * count, "weight files"), "the hub's cache may be gone"
    assert needs.config_of(of, "old")["model_type"] == "opt"


def test_the_key_is_a_parameter_of_the_job_that_fetches(tmp_path):
    commits, model = {"tiny": "a" * 40, "words": "b" * 40}, {"hub": "someone/old", "revision": "a" * 40}
    with_it, without = (study(tmp_path, commits, models={"m": model | {"convert": key}}) for key in (True, False))
    assert json.loads(with_it.reference("m")) == json.loads(without.reference("m")) | {"convert": True}
    assert json.loads(without.reference("m"))["convert"] is False
