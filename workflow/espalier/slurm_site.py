"""What a Slurm cluster has, compared with what a profile asks for, before any job is submitted.

Slurm refuses some mistakes with words that do not say which line is meant ("Requested node configuration is not
available"). Others it accepts, and the job waits for ever: more CPUs than a node has, more time than a partition gives.
"""

from __future__ import annotations

import getpass
import re
import shutil
import subprocess
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

from espalier import slurm_nodes, slurm_queue
from espalier.errors import UserError, did_you_mean
from espalier.slurm_nodes import Mistake, Node

if TYPE_CHECKING:
    from snakemake.resources import Resource
    from snakemake.settings.types import ResourceSettings

FILE = "profiles/slurm/config.yaml"
ELSEWHERE = ("clusters", "cluster", "slurm_cluster")  # resources that send a job to another cluster
COMMANDS = ("sinfo", "sbatch", "squeue", "scancel", "scontrol", "sacct")  # those that Snakemake's Slurm plugin calls
# What AccountingStorageEnforce may say and still let in a job without an account; all else, `limits` say, does not.
LENIENT = {"none", "(null)", "nojobs", "nosteps", ""}


class _Accounts(NamedTuple):
    """What the accounting database knows of this user, and what Slurm makes of it."""

    enforced: set[str]
    qos: dict[str, set[str]]  # of each account of the user


def accounting() -> bool:
    """Return whether `sacct` answers here, within ten seconds; False on a machine without Slurm. Raises nothing."""
    return _run("sacct", "--noheader", "--allocations", "--starttime", "now", seconds=10).returncode == 0


def requested(
    settings: ResourceSettings, wildcards: Mapping[str, Mapping[str, str]]
) -> tuple[dict[str, dict], dict, dict]:
    """Return what `check` takes, from `workflow.resource_settings`: set-resources, default-resources and set-threads.

    An expression gets the value of a first attempt, with the wildcards given for its rule; one that needs more is left
    out.
    Raises UserError for a name that Snakemake, which takes each value for an expression if it can, finds in Python.
    """

    def values(key: str, resources: Mapping[str, Resource], wildcards: Mapping[str, str] = {}) -> dict:
        found = {name: _value(f"{key}.{name}", resource, wildcards) for name, resource in resources.items()}
        return {name: value for name, value in found.items() if value is not None}

    by_rule = settings._parsed_overwrite_resources.items()
    return (
        {rule: values(f"set-resources.{rule}", resources, wildcards.get(rule, {})) for rule, resources in by_rule},
        values("default-resources", settings._parsed_default_resources),
        values("set-threads", settings._parsed_overwrite_threads),
    )


def check(
    resources: Mapping[str, Mapping[str, object]],
    default: Mapping[str, object],
    threads: Mapping[str, object],
    plugin_chooses: bool = False,
) -> None:
    """Raise UserError, one line a mistake, for what jobs ask and no node or account of this cluster gives.

    Resources are given by rule and name, and where a rule names none, the default holds. A request for several GPUs is
    meant for one node. Nodes are not looked at for jobs that go to another cluster, nor where the plugin itself chooses
    the partition.
    """
    if missing := lacking():
        raise UserError(
            f"This machine is not a login node of a Slurm cluster (it has no {missing}): log in to one, or leave"
            " --profile slurm out to run here."
        )
    nodes, accounts = _nodes(), _accounts()
    mistakes = {}  # an ordered set: a default is wrong once, for however many rules
    for rule in [*dict.fromkeys([*resources, *threads]), None]:
        own = resources.get(rule, {})
        asked = {"threads": threads.get(rule), **default, **own}
        found = []
        if not any(map(asked.get, ELSEWHERE)) and not (plugin_chooses and not asked.get("slurm_partition")):
            unknown, offered = slurm_nodes.offered(asked, nodes)
            found = unknown or slurm_nodes.mistakes(asked, offered, nodes)
        for name, sentence in [*_account_mistakes(asked, accounts), *found]:
            mistakes[f"{FILE}: {_key(rule, name, own)}: {sentence}"] = None
    if mistakes:
        raise UserError("\n".join(mistakes))


def lacking() -> str:
    """Return what this machine lacks to be a login node: commands, or a configuration; nothing where it is one."""
    missing = [command for command in COMMANDS if not shutil.which(command)]
    if not missing and slurm_queue.UNCONFIGURED in _run("sinfo", "--noheader", "--format=%R").stderr:
        missing = ["slurm.conf"]
    return ", ".join(missing)


def _value(key: str, resource: Resource, wildcards: Mapping[str, str]) -> object:
    """Return the value of a resource as far as it is known without a job."""
    try:
        found = resource.evaluate(wildcards, input=[], attempt=1, threads=1, rulename="", async_run=None)
    except Exception:  # an expression may raise anything
        return None
    if found.is_evaluable():  # a function: a partition may well have the name `all`
        quoted = f"\"'{resource.raw}'\""
        raise UserError(f"{FILE}: {key}: Snakemake takes {resource.raw} for a function of Python: write {quoted}.")
    return found.value


def _key(rule: str | None, name: str, own: Mapping[str, object]) -> str:
    """Return the key of the profile that sets a resource; without a name, all of a rule's."""
    if name == "threads":
        return f"set-threads.{rule}"
    keys = ("set-resources", rule, name) if rule and (not name or name in own) else ("default-resources", name)
    return ".".join(filter(None, keys))


def _nodes() -> list[Node]:
    """Return what all partitions have, those included that are hidden."""
    answer = _run("sinfo", "--all", "--exact", "--noconvert", "--noheader", "--format", slurm_nodes.FIELDS)
    if answer.returncode:
        raise UserError(
            f"Slurm does not answer here, so nothing was submitted (sinfo: {_words(answer)}). Run the same command"
            " again when `sinfo` lists the partitions, or ask the cluster's administrators."
        )
    return slurm_nodes.read(answer.stdout)


def _accounts() -> _Accounts | None:
    """Return what is known of this user; None where no accounts are kept, or their database is down.

    Slurm and the plugin then take any account: Slurm does not look at it, or goes by what it remembers.
    """
    config = dict(re.findall(r"^(\w+) *= (.*?) *$", _run("scontrol", "show", "config").stdout, re.MULTILINE))
    of_user = (f"user={getpass.getuser()}", f"cluster={config.get('ClusterName')}")
    answer = _run("sacctmgr", "--noheader", "--parsable2", "show", "associations", *of_user, "format=account,qos")
    if answer.returncode:
        return None
    qos = {}
    for line in answer.stdout.splitlines():
        account, names = line.split("|")
        qos.setdefault(account.lower(), set()).update(filter(None, names.split(",")))
    return _Accounts(set(config.get("AccountingStorageEnforce", "").split(",")) - LENIENT, qos)


def _account_mistakes(asked: Mapping[str, object], accounts: _Accounts | None) -> list[Mistake]:
    """Return what is wrong with the account and the QOS that a job names."""
    if accounts is None:
        return []
    # Of several accounts the plugin uses the first.
    given, user = re.split(r"[,\s]+", str(asked.get("slurm_account") or "").lower())[0], getpass.getuser()
    if accounts.enforced and not accounts.qos:
        sentence = f"the user {user} has no account on this cluster, which takes no job without one: apply for one."
        return [("slurm_account", sentence)]
    if given and accounts.qos and given not in accounts.qos:  # the plugin refuses it, also where Slurm does not
        return [("slurm_account", f"'{given}' is no account of the user {user}.{did_you_mean(given, accounts.qos)}")]
    allowed = set().union(*(qos for account, qos in accounts.qos.items() if given in ("", account)))
    if asked.get("qos") and accounts.enforced & {"qos", "all"} and str(asked["qos"]) not in allowed:
        return [("qos", f"'{asked['qos']}' is no QOS of the user {user}.{did_you_mean(asked['qos'], allowed)}")]
    return []


def _run(*command: str, seconds: float = 60) -> subprocess.CompletedProcess:
    """Run a command of Slurm; one that is missing, or silent for so long, has failed."""
    try:
        return subprocess.run(command, check=False, capture_output=True, text=True, timeout=seconds)
    except (OSError, subprocess.TimeoutExpired) as error:
        return subprocess.CompletedProcess(command, 1, "", str(error))


def _words(answer: subprocess.CompletedProcess) -> str:
    """Return in one line what Slurm said of its failure."""
    return " ".join((answer.stderr or answer.stdout).split())
