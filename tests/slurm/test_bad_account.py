"""Mistakes in the account, on a real Slurm that keeps accounts and takes no job without one."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator

import pytest

from cluster import Cluster, Unavailable
from espalier import slurm_site
from espalier.errors import UserError

pytestmark = pytest.mark.slurm_accounting

PROFILE = "profiles/slurm/config.yaml:"
RULE = f"{PROFILE} set-resources.prune_model"


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    try:
        with Cluster(accounting=True, enforce="associations,limits,qos") as cluster:
            yield cluster
    except Unavailable as reason:
        pytest.skip(str(reason))


@pytest.fixture(autouse=True)
def _here(cluster, monkeypatch):
    monkeypatch.setenv("PATH", cluster.environment()["PATH"])
    monkeypatch.setenv("LOGNAME", "root")


# What is asked, what of it sbatch is given, what Slurm says, and what is said before.
MISTAKES = {
    "an account": (
        {"slurm_account": "espalir"},
        ["--account=espalir"],
        "Invalid account or account/partition combination specified",
        f"{RULE}.slurm_account: 'espalir' is no account of the user root. Did you mean 'espalier'?",
    ),
    "a QOS": (
        {"qos": "norml"},
        ["--qos=norml"],
        "Invalid qos specification",
        f"{RULE}.qos: 'norml' is no QOS of the user root. Did you mean 'normal'?",
    ),
}


@pytest.mark.parametrize(("rule", "options", "slurm", "sentence"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_named_before_slurm_refuses(cluster, rule, options, slurm, sentence):
    with pytest.raises(UserError) as caught:
        slurm_site.check({"prune_model": rule}, {}, {})
    assert str(caught.value) == sentence
    command = ["sbatch", *options, "--wrap", "true"]
    refused = subprocess.run(command, env=cluster.environment(), capture_output=True, text=True, check=False)
    assert slurm in refused.stderr


def test_a_user_without_an_account_is_told_so(monkeypatch):
    monkeypatch.setenv("LOGNAME", "nobody")
    sentence = "the user nobody has no account on this cluster, which takes no job without one: apply for one."
    with pytest.raises(UserError) as caught:
        slurm_site.check({}, {}, {})
    assert str(caught.value) == f"{PROFILE} default-resources.slurm_account: {sentence}"


def test_what_there_is_is_let_through_also_while_the_database_is_down(cluster):
    given = {"slurm_account": "Espalier", "qos": "normal"}
    assert slurm_site.accounting()
    slurm_site.check({"prune_model": given}, {}, {})
    database = cluster.daemons["slurmdbd"]
    database.terminate()
    database.wait(10)
    assert not slurm_site.accounting()
    slurm_site.check({"prune_model": given}, {}, {})
    cluster.run("sbatch", "--wait", "--account=espalier", "--output=/dev/null", "--wrap", "true")
