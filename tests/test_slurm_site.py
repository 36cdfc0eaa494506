"""What a profile asks of a Slurm cluster, against what Slurm 22.05 printed on real ones."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from snakemake.resources import Resource, Resources
from snakemake.settings.types import ResourceSettings

from espalier import needs, slurm_site
from espalier.errors import UserError
from espalier.slurm_nodes import FIELDS

SINFO = """\
cpu|cpu*|up|gpu:h200:2|h200,fast|8|UNLIMITED|16000|1:00:00
gpu|gpu|up|gpu:a100:4(S:0-1),gpu:v100:2(S:0)|rack1|64|UNLIMITED|512000|2-00:00:00
gpu|gpu|up|gpu:h200:2|h200,fast|8|UNLIMITED|16000|2-00:00:00
plain|plain|up|gpu:2|a100,fast|8|UNLIMITED|16000|30:00
cold|cold|drain|(null)|(null)|32|UNLIMITED|128000|infinite
off|off|inactive|(null)|(null)|32|UNLIMITED|128000|infinite
later|later|down|(null)|(null)|32|UNLIMITED|128000|infinite
few|few|up|(null)|(null)|32|4|128000|infinite
"""
NO_ACCOUNTS = """\
Configuration data as of 2026-11-21T10:59:47
AccountingStorageEnforce = none
AccountingStorageType   = accounting_storage/none
ClusterName             = espalier
"""
ACCOUNTS = """\
AccountingStorageEnforce = associations,limits,qos
AccountingStorageType   = accounting_storage/slurmdbd
ClusterName             = espalier
"""
LENIENT = ACCOUNTS.replace("associations,limits,qos", "none")
UNSUPPORTED = "You are not running a supported accounting_storage plugin\n"
REFUSED = (
    "sacctmgr: error: slurm_persist_conn_open_without_init: failed to open persistent connection to host:127.0.0.1:6819"
    ": Connection refused"
)


class Site:
    """Fakes of Slurm's commands, which print what they are given."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch):
        self.folder = folder
        monkeypatch.setenv("PATH", str(folder))
        monkeypatch.setenv("LOGNAME", "ada")
        for command in slurm_site.COMMANDS:
            self.says(command)
        self.says("sinfo", SINFO)
        self.says("scontrol", NO_ACCOUNTS)
        self.says("sacctmgr", "", UNSUPPORTED, 1)

    def says(self, command: str, text: str = "", error: str = "", status: int = 0) -> None:
        path = self.folder / command
        path.write_text(
            f"#!{sys.executable} -S\nimport sys\nprint(sys.argv[1:], file=open({str(path) + '.args'!r}, 'w'))\n"
            f"sys.stdout.write({text!r})\nsys.stderr.write({error!r})\nsys.exit({status})\n"
        )
        path.chmod(0o755)


@pytest.fixture
def site(tmp_path, monkeypatch) -> Site:
    return Site(tmp_path, monkeypatch)


def mistakes(rule: dict, default: dict | None = None, threads: dict | None = None) -> list[str]:
    """Return the sentences about a rule `prune_model`, without the file's name."""
    try:
        slurm_site.check({"prune_model": rule}, default or {}, threads or {})
    except UserError as error:
        return [line.removeprefix("profiles/slurm/config.yaml: ") for line in str(error).splitlines()]
    return []


RIGHT = {
    "nothing": {},
    "all that a node has": {"gres": "gpu:2", "mem_mb": 16000, "runtime": 60, "cpus_per_task": 8},
    "a type": {"slurm_partition": "gpu", "gres": "gpu:a100:4", "runtime": 2880},
    "one GPU without a number": {"slurm_partition": "gpu", "gres": "gpu:v100"},
    "GPUs of any type": {"slurm_partition": "gpu", "gres": "gpu:6"},
    "a model": {"slurm_partition": "gpu", "gpu_model": "v100", "gpu": 2},
    "GPUs without a type": {"slurm_partition": "plain", "gpu": 2},
    "two partitions": {"slurm_partition": "cpu,gpu", "gres": "gpu:a100:1", "runtime": 600},
    "a partition that is down": {"slurm_partition": "later"},
    "two partitions, of which one is drained": {"slurm_partition": "cpu,cold"},
    "another cluster's partition": {"slurm_partition": "gpus", "clusters": "other"},
    "no time limit": {"slurm_partition": "few", "runtime": 10**6, "cpus_per_task": 4},
    "one of two features": {"slurm_partition": "gpu", "constraint": "[rack1|a100]"},
    "two features": {"constraint": "h200&fast"},
    "a feature with a number": {"constraint": "h200*1"},
    "a QOS, which may have longer times": {"qos": "long", "runtime": 10**6},
    "text that is no number": {"mem_mb": "needs.megabytes(wildcards)", "runtime": "soon"},
}


@pytest.mark.parametrize("rule", RIGHT.values(), ids=RIGHT)
def test_what_the_cluster_has_is_let_through(site, rule):
    assert mistakes(rule) == []


WRONG = {
    "a partition": (
        {"slurm_partition": "gpus", "gres": "gpu:99"},
        ".slurm_partition: this cluster has no partition 'gpus'. Did you mean 'gpu'?",
    ),
    "one of two partitions": (
        {"slurm_partition": "cpu,gpux"},
        ".slurm_partition: this cluster has no partition 'gpux'. Did you mean 'gpu'?",
    ),
    "a drained partition": (
        {"slurm_partition": "cold"},
        ".slurm_partition: partition 'cold' takes no jobs now (its state is 'drain'): name another, or wait.",
    ),
    "an inactive partition": (
        {"slurm_partition": "off"},
        ".slurm_partition: partition 'off' takes no jobs now (its state is 'inactive'): name another, or wait.",
    ),
    "a GPU type": (
        {"gres": "gpu:h100:1"},
        ".gres: no node of partition 'cpu' has gpu:h100:1; they have gpu:h200:2.",
    ),
    "a GPU type of another partition": (
        {"gres": "gpu:a100:1"},
        ".gres: no node of partition 'cpu' has gpu:a100:1; they have gpu:h200:2. slurm_partition 'gpu' would do.",
    ),
    "a GPU type in capitals": (
        {"slurm_partition": "gpu", "gres": "gpu:A100:1"},
        ".gres: no node of partition 'gpu' has gpu:A100:1; they have gpu:a100:4,gpu:v100:2 or gpu:h200:2.",
    ),
    "a GPU type where GPUs have none": (
        {"slurm_partition": "plain", "gres": "gpu:a100:1"},
        ".gres: no node of partition 'plain' has gpu:a100:1; they have gpu:2, without a type: a type may be a feature"
        " there, which `constraint` names (`sinfo -o '%P %f'`). slurm_partition 'gpu' would do.",
    ),
    "a GPU model": (
        {"gpu_model": "h100", "gpu": 1},
        ".gpu_model: no node of partition 'cpu' has gpu:h100:1; they have gpu:h200:2.",
    ),
    "too many GPUs": (
        {"gpu": 3},
        ".gpu: no node of partition 'cpu' has gpu:3; they have gpu:h200:2. slurm_partition 'gpu' would do.",
    ),
    "a GPU where there is none": (
        {"slurm_partition": "few", "gres": "gpu:1"},
        ".gres: no node of partition 'few' has gpu:1; they have none."
        " slurm_partition 'cpu' or 'gpu' or 'plain' would do.",
    ),
    "no such kind of resource": (
        {"gres": "gpus:1"},
        ".gres: no node of partition 'cpu' has gpus:1; they have gpu:h200:2.",
    ),
    "GPUs in another form": ({"gres": "gpu=1"}, ".gres: 'gpu=1' is not of the form gpu:1 or gpu:a100:1."),
    "GPUs in two forms": (
        {"gres": "gpu:1", "gpu": 1},
        ".gres: 'gpu:1' excludes the resources `gpu` and `gpu_model`: keep one way of asking for GPUs.",
    ),
    "a feature": (
        {"constraint": "h200|h100"},
        ".constraint: no node of partition 'cpu' has the features 'h200|h100'; no node of this cluster has 'h100'."
        " Did you mean 'h200'?",
    ),
    "a feature of another partition": (
        {"constraint": "rack1"},
        ".constraint: no node of partition 'cpu' has the features 'rack1'; they have fast,h200."
        " slurm_partition 'gpu' would do.",
    ),
    "features of different nodes": (
        {"slurm_partition": "gpu", "constraint": "rack1&h200"},
        ".constraint: no node of partition 'gpu' has the features 'rack1&h200'; they have rack1 or fast,h200.",
    ),
    "CPUs": (
        {"cpus_per_task": 9},
        ".cpus_per_task: no node of partition 'cpu' has 9 CPUs; the most is 8. slurm_partition 'gpu' would do.",
    ),
    "CPUs beyond the partition's limit": (
        {"slurm_partition": "few", "cpus_per_task": 65},
        ".cpus_per_task: no node of partition 'few' has 65 CPUs; the most is 4.",
    ),
    "CPUs for each GPU": (
        {"gres": "gpu:2", "cpus_per_gpu": 40},
        ".cpus_per_gpu: no node of partition 'cpu' has 80 CPUs; the most is 8.",
    ),
    "memory": (
        {"mem_mb": 600000},
        ".mem_mb: no node of partition 'cpu' has 600000 MB of memory; the most is 16000.",
    ),
    "memory for each CPU": (
        {"slurm_partition": "gpu", "mem_mb_per_cpu": 10000, "cpus_per_task": 60},
        ".mem_mb_per_cpu: no node of partition 'gpu' has 600000 MB of memory; the most is 512000.",
    ),
    "time": (
        {"slurm_partition": "gpu", "runtime": 2881, "gres": "gpu:1"},
        ".runtime: no node of partition 'gpu' has 2881 minutes for a job; the most is 2880."
        " slurm_partition 'few' would do.",
    ),
    "half an hour": (
        {"slurm_partition": "plain", "runtime": "31", "gres": "gpu:h200:1"},
        ".gres: no node of partition 'plain' has gpu:h200:1; they have gpu:2, without a type: a type may be a feature"
        " there, which `constraint` names (`sinfo -o '%P %f'`). slurm_partition 'cpu' or 'gpu' would do.\n"
        ".runtime: no node of partition 'plain' has 31 minutes for a job; the most is 30."
        " slurm_partition 'cpu' or 'gpu' or 'few' would do.",
    ),
    "too much at once": (
        {"slurm_partition": "gpu", "gres": "gpu:h200:1", "cpus_per_task": 16},
        ": no node of partition 'gpu' has all of this at once: gpu:h200:1, 16 CPUs.",
    ),
}


@pytest.mark.parametrize(("rule", "expected"), WRONG.values(), ids=WRONG)
def test_what_the_cluster_lacks_is_named(site, rule, expected):
    assert mistakes(rule) == [f"set-resources.prune_model{line}" for line in expected.split("\n")]


def test_each_mistake_is_told_once_at_the_key_that_makes_it(site):
    rules = {"prune_model": {"runtime": 10}, "tune_model": {}}
    with pytest.raises(UserError) as caught:
        slurm_site.check(rules, {"mem_mb": 17000, "slurm_partition": "cpu"}, {"tune_model": 9, "profile_model": 8})
    assert str(caught.value).splitlines() == [
        "profiles/slurm/config.yaml: default-resources.mem_mb: no node of partition 'cpu' has 17000 MB of memory;"
        " the most is 16000. slurm_partition 'gpu' or 'few' would do.",
        "profiles/slurm/config.yaml: set-threads.tune_model: no node of partition 'cpu' has 9 CPUs; the most is 8."
        " slurm_partition 'gpu' would do.",
    ]


def test_a_cluster_without_a_default_partition_chooses_itself(site):
    site.says("sinfo", SINFO.replace("cpu*", "cpu"))
    assert mistakes({"gres": "gpu:a100:4", "mem_mb": 512000}) == []
    assert len(mistakes({"gres": "gpu:a100:5"})) == 1


ONE_ACCOUNT = "lab|normal,long\n"
TWO_ACCOUNTS = "lab|normal\nclinic|normal,long\n"
APPLY = ": the user ada has no account on this cluster, which takes no job without one: apply for one."
ACCOUNT_CASES = {
    "its default account": (ACCOUNTS, ONE_ACCOUNT, {}, None),
    "the first of several": (ACCOUNTS, ONE_ACCOUNT, {"slurm_account": "lab, other"}, None),
    "in capitals": (ACCOUNTS, ONE_ACCOUNT, {"slurm_account": "LAB"}, None),
    "another account": (
        ACCOUNTS,
        ONE_ACCOUNT,
        {"slurm_account": "lap"},
        ".slurm_account: 'lap' is no account of the user ada. Did you mean 'lab'?",
    ),
    "another, not enforced": (
        LENIENT,
        ONE_ACCOUNT,
        {"slurm_account": "lap"},
        ".slurm_account: 'lap' is no account of the user ada. Did you mean 'lab'?",
    ),
    "no account": (ACCOUNTS, "", {}, APPLY),
    "an account without any": (ACCOUNTS, "", {"slurm_account": "lab"}, ".slurm_account" + APPLY),
    "no account, not enforced": (LENIENT, "", {"slurm_account": "lab"}, None),
    "a QOS": (ACCOUNTS, ONE_ACCOUNT, {"qos": "long"}, None),
    "another QOS": (
        ACCOUNTS,
        ONE_ACCOUNT,
        {"qos": "lang"},
        ".qos: 'lang' is no QOS of the user ada. Did you mean 'long'?",
    ),
    "a QOS of another account": (
        ACCOUNTS,
        TWO_ACCOUNTS,
        {"qos": "long", "slurm_account": "lab"},
        ".qos: 'long' is no QOS of the user ada. Known: normal.",
    ),
    "a QOS of some account": (ACCOUNTS, TWO_ACCOUNTS, {"qos": "long"}, None),
    "another QOS, not enforced": (LENIENT, ONE_ACCOUNT, {"qos": "lang"}, None),
}


@pytest.mark.parametrize(("config", "associations", "rule", "expected"), ACCOUNT_CASES.values(), ids=ACCOUNT_CASES)
def test_accounts(site, config, associations, rule, expected):
    site.says("scontrol", config)
    site.says("sacctmgr", associations)
    if expected == APPLY:  # of no rule's own
        assert mistakes(rule) == ["default-resources.slurm_account" + APPLY]
    else:
        assert [line for line in mistakes(rule) if "prune_model" in line] == (
            ["set-resources.prune_model" + expected] if expected else []
        )
    assert "'user=ada', 'cluster=espalier'" in (site.folder / "sacctmgr.args").read_text()


@pytest.mark.parametrize(
    ("config", "error"),
    [
        (NO_ACCOUNTS, UNSUPPORTED),
        (ACCOUNTS, REFUSED),
    ],
)
def test_any_account_will_do_where_none_can_be_looked_up(site, config, error):
    site.says("scontrol", config)
    site.says("sacctmgr", "", error, 1)
    assert mistakes({"slurm_account": "lab", "qos": "long"}) == []


def test_a_machine_without_slurm(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"is not a login node of a Slurm cluster \(it has no sinfo, sbatch, .*sacct\)"):
        slurm_site.check({}, {}, {})
    assert not slurm_site.accounting()


def test_a_controller_that_is_down_is_quoted(site):
    site.says("sinfo", "", "slurm_load_partitions: Unable to contact slurm controller (connect failure)\n", 1)
    with pytest.raises(UserError, match=r"\(sinfo: slurm_load_partitions: .* \(connect failure\)\)\. Run the same"):
        slurm_site.check({}, {}, {})


def test_sinfo_is_asked_for_every_node_in_full(site):
    assert mistakes({}) == []
    assert (site.folder / "sinfo.args").read_text().strip() == str(
        ["--all", "--exact", "--noconvert", "--noheader", "--format", FIELDS]
    )


@pytest.mark.parametrize(
    ("error", "status", "expected"),
    [("", 0, True), ("Slurm accounting storage is disabled\n", 1, False), (REFUSED, 1, False)],
)
def test_accounting_is_what_sacct_says(site, error, status, expected):
    site.says("sacct", "", error, status)
    assert slurm_site.accounting() is expected


def settings(**values) -> ResourceSettings:
    """Return a profile's resources as Snakemake reads them: every value may be an expression."""
    rule = {name: Resource.from_cli_expression(name, text) for name, text in values.items()}
    return ResourceSettings(overwrite_resources={"prune_model": Resources(rule)}, overwrite_threads={"prune_model": 8})


def test_expressions_get_the_value_that_needs_no_job():
    given = settings(
        gres="gpu:1",
        constraint="a100|h100",
        slurm_partition="long",
        runtime="60 * attempt",
        mem_mb=needs.memory(base=8000, weights=3),
        disk_mb="input.size_mb",
    )
    resources, _, threads = slurm_site.requested(given, {})
    assert resources["prune_model"] == {
        "gres": "gpu:1",
        "constraint": "a100|h100",
        "slurm_partition": "long",
        "runtime": 60,
        "mem_mb": 8000,
    }
    assert threads == {"prune_model": 8}


def test_where_the_plugin_chooses_the_partition_only_a_named_one_is_looked_at(site):
    asked = {"gres": "gpu:a100:1"}
    assert mistakes(asked)
    slurm_site.check({"prune_model": asked}, {}, {}, plugin_chooses=True)
    with pytest.raises(UserError, match="no partition 'gpus'"):
        slurm_site.check({"prune_model": {"slurm_partition": "gpus"}}, {}, {}, plugin_chooses=True)


def test_a_partition_with_the_name_of_a_function():
    with pytest.raises(UserError, match=r"set-resources\.prune_model\.slurm_partition: .* write \"'all'\"\."):
        slurm_site.requested(settings(slurm_partition="all"), {})
    resources, _, _ = slurm_site.requested(settings(slurm_partition="'all'"), {})
    assert resources == {"prune_model": {"slurm_partition": "all"}}
