"""What the nodes of a Slurm cluster have, and what of that a job asks for. Nothing here calls Slurm."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping
from typing import NamedTuple

from espalier.errors import did_you_mean

FIELDS = "%R|%P|%a|%G|%f|%c|%B|%m|%l"  # the format in which `read` takes sinfo's answer
GRES = r"\w+(:[\w.]+)?(:\d+[KMGT]?)?"  # one generic resource, as the plugin takes it
CLOSED = ("drain", "inact")  # states of a partition that takes no jobs; one that is down lets them wait

Mistake = tuple[str, str]  # the resource that asks too much (or '' for several at once), and a sentence


class Node(NamedTuple):
    """Nodes of a partition that have the same of everything."""

    partition: str
    default: bool
    state: str
    gres: str
    features: frozenset[str]
    cpus: int
    memory_mb: int
    minutes: float


class Need(NamedTuple):
    """One thing that a job asks of its node."""

    name: str  # of the resource
    words: str
    fits: Callable[[Node], bool]
    offer: Callable[[list[Node]], str]  # what these nodes have instead


def read(lines: str) -> list[Node]:
    """Return the nodes that `sinfo --exact --noheader --format FIELDS` lists."""
    nodes = []
    for line in lines.splitlines():
        name, starred, state, gres, features, cpus, most_cpus, memory, limit = line.split("|")
        most = int(cpus) if most_cpus == "UNLIMITED" else min(int(cpus), int(most_cpus))
        known = frozenset() if features == "(null)" else frozenset(features.split(","))
        gres = re.sub(r"\([^)]*\)", "", gres)  # the sockets that GPUs are bound to, or (null)
        nodes.append(Node(name, starred.endswith("*"), state, gres, known, most, int(memory), _minutes(limit)))
    return nodes


def offered(asked: Mapping[str, object], nodes: list[Node]) -> tuple[list[Mistake], list[Node]]:
    """Return mistakes in the name of the partition, and the nodes that a job may get."""
    if asked.get("slurm_partition"):
        names = str(asked["slurm_partition"]).split(",")
    else:
        names = [node.partition for node in nodes if node.default]
    states = {node.partition: node.state for node in nodes}
    mistakes = []
    closed = all(states.get(name, "").startswith(CLOSED) for name in names)  # of several, Slurm takes one that is open
    for name in names:
        if name not in states:
            mistakes.append(("slurm_partition", f"this cluster has no partition '{name}'.{did_you_mean(name, states)}"))
        elif closed:
            sentence = f"partition '{name}' takes no jobs now (its state is '{states[name]}'): name another, or wait."
            mistakes.append(("slurm_partition", sentence))
    # Without a name and without a default, the site itself chooses (a job_submit plugin): any node will do.
    open_ones = [node for node in nodes if node.partition in names and not states[node.partition].startswith(CLOSED)]
    return mistakes, open_ones if names else nodes


def mistakes(asked: Mapping[str, object], offered: list[Node], nodes: list[Node]) -> list[Mistake]:
    """Return what a job asks and none of the nodes has that it is offered, and which partition has it."""
    gres = str(asked.get("gres") or "")
    if gres and not re.fullmatch(GRES, gres):
        return [("gres", f"'{gres}' is not of the form gpu:1 or gpu:a100:1.")]
    if gres and (asked.get("gpu") or asked.get("gpu_model")):
        return [("gres", f"'{gres}' excludes the resources `gpu` and `gpu_model`: keep one way of asking for GPUs.")]
    needs = _needs(asked, nodes)

    def elsewhere(*needs: Need) -> str:
        fitting = [node for node in nodes if node not in offered and all(need.fits(node) for need in needs)]
        names = dict.fromkeys(f"'{node.partition}'" for node in fitting if node.state == "up")
        return f" slurm_partition {' or '.join(names)} would do." if names else ""

    where = " or ".join(dict.fromkeys(f"'{node.partition}'" for node in offered))
    found = [
        (need.name, f"no node of partition {where} has {need.words}; {need.offer(offered)}{elsewhere(need)}")
        for need in needs
        if not any(need.fits(node) for node in offered)
    ]
    if not found and not any(all(need.fits(node) for need in needs) for node in offered):
        words = ", ".join(need.words for need in needs)
        found = [("", f"no node of partition {where} has all of this at once: {words}.{elsewhere(*needs)}")]
    return found


def _needs(asked: Mapping[str, object], nodes: list[Node]) -> list[Need]:
    """Return what a job asks of its node."""
    needs, gpus = [], 0
    if asked.get("gres"):
        ((name, kind), count), *_ = _counts(str(asked["gres"])).items()
        needs.append(_gres("gres", name, kind, count))
        gpus = count if name == "gpu" else 0
    elif asked.get("gpu_model") or _number(asked.get("gpu")):
        kind, gpus = str(asked.get("gpu_model") or ""), _number(asked.get("gpu")) or 1
        needs.append(_gres("gpu_model" if kind else "gpu", "gpu", kind, gpus))
    if asked.get("constraint"):
        needs.append(_constraint(str(asked["constraint"]), nodes))

    cpus_key = "cpus_per_task" if asked.get("cpus_per_task") else "threads"
    cpus = _number(asked.get(cpus_key))
    if gpus and not asked.get("cpus_per_task") and asked.get("cpus_per_gpu"):
        cpus_key, cpus = "cpus_per_gpu", gpus * _number(asked["cpus_per_gpu"])
    memory_key = "mem_mb_per_cpu" if asked.get("mem_mb_per_cpu") else "mem_mb"
    memory = _number(asked.get(memory_key)) * (max(cpus, 1) if memory_key == "mem_mb_per_cpu" else 1)
    limit = 0 if asked.get("qos") else _number(asked.get("runtime"))  # a QOS may outrank the partition's limit
    for key, value, unit, field in (
        (cpus_key, cpus, "CPUs", "cpus"),
        (memory_key, memory, "MB of memory", "memory_mb"),
        ("runtime", limit, "minutes for a job", "minutes"),
    ):
        if value:
            needs.append(_at_least(key, value, unit, field))
    return needs


def _gres(key: str, name: str, kind: str, count: int) -> Need:
    """A generic resource, nearly always GPUs; without a kind, any kind will do."""

    def fits(node: Node) -> bool:
        return sum(n for (has, type), n in _counts(node.gres).items() if has == name and kind in ("", type)) >= count

    def offer(nodes: list[Node]) -> str:
        has = " or ".join(dict.fromkeys(node.gres for node in nodes if node.gres))
        if not has:
            return "they have none."
        if kind and any((name, "") in _counts(node.gres) for node in nodes):
            has += ", without a type: a type may be a feature there, which `constraint` names (`sinfo -o '%P %f'`)"
        return f"they have {has}."

    return Need(key, ":".join(filter(None, (name, kind, str(count)))), fits, offer)


def _constraint(text: str, nodes: list[Node]) -> Need:
    """Features of a node, joined by & or |; counts and brackets, which are for several nodes, are not looked at."""
    plain = re.sub(r"\*\d+|[\s()\[\]]", "", text)
    choices = [set(choice.split("&")) for choice in plain.split("|")]
    known = set().union(*(node.features for node in nodes))
    unknown = sorted(set().union(*choices) - known)

    def fits(node: Node) -> bool:  # Slurm refuses a job for a name that no node has, also beside others
        return not unknown and any(choice <= node.features for choice in choices)

    def offer(offered: list[Node]) -> str:
        if unknown:
            return f"no node of this cluster has '{unknown[0]}'.{did_you_mean(unknown[0], known)}"
        return f"they have {' or '.join(dict.fromkeys(','.join(sorted(node.features)) or 'none' for node in offered))}."

    return Need("constraint", f"the features '{text}'", fits, offer)


def _at_least(key: str, value: int, unit: str, field: str) -> Need:
    """A number that a node must reach."""
    return Need(
        key,
        f"{value} {unit}",
        lambda node: getattr(node, field) >= value,
        lambda nodes: f"the most is {max(getattr(node, field) for node in nodes):.0f}.",
    )


def gpus_of(gres: str) -> int:
    """Return the number of GPUs in Slurm's list of generic resources, of NAME, NAME:COUNT and NAME:TYPE:COUNT."""
    return sum(count for (name, _), count in _counts(gres).items() if name == "gpu")


def _counts(gres: str) -> Counter:
    """Return counts by name and type of `gpu:a100:4,gpu:2`; a type that is not given is ''."""
    counts = Counter()
    for part in filter(None, gres.split(",")):
        name, *rest = part.split(":")
        number = re.fullmatch(r"(\d+)[KMGT]?", rest[-1]) if rest else None
        counts[name, ":".join(rest[:-1] if number else rest)] += int(number[1]) if number else 1
    return counts


def _number(value: object) -> int:
    """Return a whole number; 0 for anything else."""
    return int(value) if str(value).isdecimal() else 0


def _minutes(limit: str) -> float:
    """Return the minutes of `2-00:00:00`, `1:00:00`, `30:00` or `infinite`."""
    if limit == "infinite":
        return float("inf")
    days, _, clock = limit.rpartition("-")
    seconds = 0
    for part in clock.split(":"):
        seconds = seconds * 60 + int(part)
    return int(days or 0) * 1440 + seconds / 60
