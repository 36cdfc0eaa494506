"""Espalier: language models through prune, tune, quantize, evaluate, profile and plot.

Config: config.yaml (the demo study), or any complete study given with --configfile.
Targets: all (default), figures, tables, report, reference_figures, prefetch, and each chart by its name.
"""

import gc
import os
import sys

from snakemake.exceptions import WorkflowError
from snakemake.utils import min_version
from snakemake_interface_executor_plugins.settings import SharedFSUsage

from espalier import environments, hub, needs, preflight, takeover
from espalier.errors import UserError
from espalier.study import Study

min_version("9.0")

# All that is imported by now stays: looking through it again and again would be a third of a dry-run.
gc.freeze()


if not workflow.configfiles:  # a study given with --configfile stands alone: it is never merged into the demo's

    configfile: "config.yaml"


try:
    STUDY = Study(
        config,
        file=os.path.relpath(workflow.configfiles[-1]),
        submits=preflight.submits,
    )
except UserError as error:
    # Snakemake would print a traceback for any other exception.
    sys.tracebacklimit = 0
    raise WorkflowError(str(error))


needs.study = STUDY
takeover.guard(workflow, STUDY)


os.environ.update(hub.pins(STUDY))
# In a job that was submitted, on a file system that it shares; not every cluster hands the environment on to it.
if workflow.remote_exec and SharedFSUsage.PERSISTENCE in workflow.storage_settings.shared_fs_usage:
    os.environ.update(hub.environment(STUDY))


# Jobs run in the environment that runs snakemake, also where it is not activated; with --software-deployment-method,
# each job has its own.
if not workflow.deployment_settings.deployment_method:
    os.environ.update(PATH=os.path.dirname(sys.executable) + os.pathsep + os.environ.get("PATH", ""))

RUN = f"{STUDY.root}/runs/{{model}}/s{{seed}}"


onstart:
    preflight.ask_hub(workflow, STUDY)


wildcard_constraints:
    model=STUDY.pattern(STUDY.resolved.models),
    seed=r"\d+",
    chain=STUDY.chain_pattern,
    parent=STUDY.chain_pattern,
    dataset=STUDY.pattern(STUDY.resolved.generated),
    suite=STUDY.pattern(STUDY.resolved.suites),
    workload=STUDY.pattern(STUDY.resolved.workloads),
    text=STUDY.pattern(STUDY.texts),
    environment=STUDY.pattern(STUDY.environments),


include: "workflow/rules/prefetch.smk"
include: "workflow/rules/models.smk"
include: "workflow/rules/calibrate.smk"
include: "workflow/rules/prune.smk"
include: "workflow/rules/tune.smk"
include: "workflow/rules/quantize.smk"
include: "workflow/rules/evaluate.smk"
include: "workflow/rules/environments.smk"
include: "workflow/rules/profile.smk"
include: "workflow/rules/tables.smk"
include: "workflow/rules/figures.smk"
include: "workflow/rules/report.smk"


rule all:
    """Make all tables and charts of this study."""
    default_target: True
    input:
        rules.tables.input,
        rules.figures.input,
