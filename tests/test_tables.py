"""Tidy rows and the warnings about results that do not belong on one axis."""

from __future__ import annotations

import copy

from espalier import tables
from test_bad_input import result


def test_rows_are_complete_and_sorted():
    second = result(measurements=[
        {"task": "b", "metric": "latency", "value": None, "unit": "s", "batch_size": 16, "outcome": "oom"},
        {"task": "b", "metric": "latency", "value": 2.0, "unit": "s", "batch_size": 4},
    ])  # fmt: skip
    second["identity"] = {**second["identity"], "chain": "dense+a"}
    rows = tables.tidy([second, result()])
    assert [(row["chain"], row["batch_size"], row["value"], row["outcome"]) for row in rows] == [
        ("dense", None, 0.5, "ok"), ("dense+a", 4, 2.0, "ok"), ("dense+a", 16, None, "oom")
    ]  # fmt: skip
    assert all(tuple(row) == tables.COLUMNS for row in rows)
    assert rows[0]["suite"] == "suite"
    assert rows[0]["parameters"] == 7


def test_frame_has_fixed_columns_and_whole_numbers():
    frame = tables.frame([result()])
    assert tuple(frame.columns) == tables.COLUMNS
    assert (
        frame.to_csv(index=False).splitlines()[1]
        == "s,m,0,dense,evaluate,suite,t,acc,0.5,0.1,4,fraction,,,,,ok,7,32.0,float,CPU: cpu"
    )


def test_arithmetic_is_what_the_checkpoint_says_and_else_float():
    packed = result(checkpoint=result()["checkpoint"] | {"arithmetic": "unpacked"})
    assert [row["arithmetic"] for row in tables.tidy([packed, result()])] == ["unpacked", "float"]


def test_mixed_devices_libraries_and_code_are_told():
    other = copy.deepcopy(result())
    assert tables.incomparable([result(), other]) == []
    other["provenance"] |= {"code": "d", "packages": {"torch": "3"}, "device": {"kind": "cuda", "name": "H200"}}
    warnings = tables.incomparable([result(), other])
    assert [warning.split(":")[0] for warning in warnings] == [
        f"evaluate 'suite' mixes results of different {fact}" for fact in ("code", "device", "torch")
    ]


def test_two_models_may_come_from_code_of_their_own():
    one, other = (
        result(kind="step", identity=result()["identity"] | {"model": name, "name": "dense"}) for name in "ab"
    )
    other["provenance"] = other["provenance"] | {"code": "d"}
    assert tables.incomparable([one, other]) == []
    other["identity"]["model"] = "a"
    assert len(tables.incomparable([one, other])) == 1


def test_a_timing_beside_other_work_is_told():
    row = {"task": "generation", "metric": "cpu_of_others", "value": 0.04, "unit": "fraction"}
    calm = result(measurements=[row])
    assert tables.disturbed([calm, result()]) == []
    shared = result(measurements=[row | {"value": 0.31}], samples={"shared_with": ["process 7: python prune_model.py"]})
    unknown = result(measurements=[row | {"value": None, "outcome": "unavailable: the calls are too short"}])
    about = "m/dense, evaluate 'suite'"
    assert tables.disturbed([calm, shared, unknown]) == [
        f"{about}: others had 31% of the CPU's time while it was timed.",
        f"{about}: it was timed beside other jobs of the same run: process 7: python prune_model.py.",
    ]
