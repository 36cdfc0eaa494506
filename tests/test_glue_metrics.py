"""GLUE's metrics against scikit-learn and scipy, on drawn rows and on edges; and their standard errors."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import numpy
import pytest
import scipy.stats
import sklearn.metrics

from espalier import glue_metrics, glue_tasks

REFERENCES = {
    "accuracy": lambda p, y: sklearn.metrics.accuracy_score(y, p),
    "f1": lambda p, y: sklearn.metrics.f1_score(y, p, labels=[1], average="micro", zero_division=0.0),
    "mcc": lambda p, y: sklearn.metrics.matthews_corrcoef(y, p),
    "pearson": lambda p, y: scipy.stats.pearsonr(p, y).statistic,
    "spearman": lambda p, y: scipy.stats.spearmanr(p, y).statistic,
}


def test_every_metric_of_a_task_is_there():
    needed = {metric for task in glue_tasks.TASKS.values() for metric in task.metrics}
    assert needed == set(glue_metrics.METRICS) == set(REFERENCES)


@pytest.mark.parametrize(
    ("metric", "classes"), [("accuracy", 2), ("accuracy", 3), ("f1", 2), ("f1", 3), ("mcc", 2)], ids=str
)
@pytest.mark.filterwarnings("ignore:A single label")
def test_labels_are_scored_as_by_scikit_learn(metric, classes):
    draw = numpy.random.default_rng(classes)
    for rows in (2, 3, 5, 40, 600):
        for right in (0.0, 0.3, 0.9, 1.0):
            for _ in range(5):
                labels = draw.integers(classes, size=rows).astype(float)
                guesses = numpy.where(draw.random(rows) < right, labels, draw.integers(classes, size=rows))
                expected = REFERENCES[metric](guesses, labels)
                assert glue_metrics.METRICS[metric](guesses, labels) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("metric", ["pearson", "spearman"])
@pytest.mark.parametrize("ties", [False, True])
def test_correlations_are_those_of_scipy(metric, ties):
    draw = numpy.random.default_rng(4)
    for rows in (2, 3, 5, 40, 600):
        for signal in (-1.0, 0.0, 0.5, 100.0):
            for _ in range(5):
                labels = 1000 + draw.normal(size=rows)
                guesses = signal * labels + draw.normal(size=rows)
                if ties:
                    labels, guesses = (numpy.append(numpy.round(one, 1), one[:2]) for one in (labels, guesses))
                expected = REFERENCES[metric](guesses, labels)
                assert glue_metrics.METRICS[metric](guesses, labels) == pytest.approx(expected, abs=1e-9)


EDGES = [  # metric, predictions, labels, value
    ("accuracy", [0, 0, 0], [1, 2, 1], 0.0),
    ("accuracy", [1], [1], 1.0),
    ("f1", [0, 0, 0], [0, 0, 0], 0.0),  # no label 1 anywhere
    ("f1", [0, 0, 0], [1, 1, 0], 0.0),
    ("f1", [1, 1, 1], [0, 0, 0], 0.0),
    ("f1", [1, 1, 1, 1], [0, 1, 0, 0], 0.4),
    ("f1", [1], [1], 1.0),
    ("mcc", [1, 1, 1], [0, 1, 1], 0.0),
    ("mcc", [0, 1, 1], [0, 0, 0], 0.0),
    ("mcc", [1, 0, 0, 1], [0, 1, 1, 0], -1.0),  # all wrong
    ("mcc", [0, 1, 1, 0], [0, 1, 1, 0], 1.0),
    ("mcc", [1], [1], 0.0),
    ("pearson", [2.0, 4.0, 6.0], [3.0, 2.0, 1.0], -1.0),
    ("pearson", [0.1, 0.1, 0.1], [3.0, 2.0, 1.0], None),
    ("pearson", [3.0, 2.0, 1.0], [0.1, 0.1, 0.1], None),
    ("pearson", [1.0], [1.0], None),
    ("pearson", [math.nan, 1.0], [0.0, 1.0], None),
    ("spearman", [1.0, 5.0, 500.0], [2.0, 3.0, 4.0], 1.0),
    ("spearman", [0.1, 0.1, 0.1], [3.0, 2.0, 1.0], None),
    ("spearman", [math.inf, 1.0], [0.0, 1.0], None),
]


@pytest.mark.parametrize(("metric", "predictions", "labels", "value"), EDGES, ids=str)
def test_edges(metric, predictions, labels, value):
    found = glue_metrics.scored(metric, predictions, labels, seed=0)
    assert found["value"] == (value if value is None else pytest.approx(value, abs=1e-12))
    if value is None:
        finite = numpy.isfinite(predictions).all()
        reason = "constant predictions or labels" if finite else "predictions are not finite"
        assert (found["stderr"], found["outcome"]) == (None, f"undefined: {reason}")
    else:
        assert "outcome" not in found
        assert (found["stderr"] is None) == (len(labels) == 1)


def test_standard_errors_agree_with_the_spread_of_fresh_samples():
    """The bootstrap and the binomial formula estimate how a score varies from one drawn set of rows to another."""
    draw = numpy.random.default_rng(3)

    def sample(metric):
        truth = draw.integers(2, size=300)
        if metric in ("pearson", "spearman"):
            labels = draw.normal(size=300)
            return labels + draw.normal(size=300), labels
        return numpy.where(draw.random(300) < 0.8, truth, 1 - truth), truth

    for metric, score in glue_metrics.METRICS.items():
        spread = numpy.std([score(*sample(metric)) for _ in range(300)], ddof=1)
        errors = [glue_metrics.scored(metric, *sample(metric), seed=i)["stderr"] for i in range(3)]
        assert numpy.mean(errors) == pytest.approx(spread, rel=0.25), metric
    fixed = sample("f1")
    assert glue_metrics.scored("f1", *fixed, seed=5) == glue_metrics.scored("f1", *fixed, seed=5)
    assert glue_metrics.scored("f1", *fixed, seed=5) != glue_metrics.scored("f1", *fixed, seed=6)


KERNELS = """
import numpy
from espalier import glue_metrics
draw = numpy.random.default_rng(0)
left = draw.normal(size=600)
print([glue_metrics.pearson(left, left + draw.normal(size=600)) for _ in range(20)])
"""


def test_the_last_digit_does_not_depend_on_the_kernel_that_blas_takes_for_a_cpu():
    said = {
        subprocess.run(
            [sys.executable, "-c", KERNELS],
            env={**os.environ, "OPENBLAS_CORETYPE": kind},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for kind in ("Prescott", "Haswell")
    }
    assert len(said) == 1
