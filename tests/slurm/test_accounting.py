"""A study on a site with accounting, where no job runs without an account."""

from __future__ import annotations

import pytest

from cluster import Cluster, Unavailable
from conftest import copy_project
from disturbed import PRUNE, Study

pytestmark = pytest.mark.slurm_accounting


@pytest.fixture(scope="module")
def cluster():
    try:
        with Cluster(accounting=True, enforce="associations") as cluster:
            yield cluster
    except Unavailable as reason:
        pytest.skip(str(reason))


def test_a_study_with_an_account_and_a_job_that_fails(cluster, tmp_path):
    """The profile is edited as it says itself; what became of a job is known from sacct."""
    study = Study(copy_project(tmp_path / "project"), cluster)
    profile = study.folder / "profiles/slurm/config.yaml"
    text = profile.read_text()
    assert text.count("# slurm_account: my-account") == 1
    profile.write_text(text.replace("# slurm_account: my-account", "slurm_account: espalier"))
    study.hold(PRUNE)
    run = study.start()
    run.holds(PRUNE)
    (job,) = study.jobs(PRUNE)
    cluster.run("scancel", job["JobId"])
    run.until(lambda: f"SLURM-job '{job['JobId']}' failed, SLURM status is: 'CANCELLED" in run.text())
    study.release(PRUNE)
    run.ends(0)
    assert {name: count for name, count in study.starts().items() if count > 1} == {PRUNE: 2}
    fields = ("sacct", "--noheader", "--parsable2", "--allocations", "--format=Account,State")
    found = [line.split("|") for line in cluster.run(*fields).splitlines()]
    assert {account for account, _ in found} == {"espalier"}
    assert sorted(state.split()[0] for _, state in found) == ["CANCELLED", *["COMPLETED"] * 7]
    assert "Nothing to be done" in study.snakemake("-n")
