"""Products with weights in every layout against float64, what is measured and kept on disk, and what is held."""

from __future__ import annotations

import contextlib
import json
from types import SimpleNamespace

import pytest
import torch

from espalier import memory, trellis
from espalier.trellis import products
from espalier.trellis.layouts import LAYOUTS
from espalier.trellis.products import ARRANGEMENTS, PLAIN, Projections

ON_CPU = [name for name in ARRANGEMENTS if name.split()[0] in ("stored", "transposed", "packed")]
# Input channels, output channels of weights that share an input, whether each has a bias.
GROUPS = [
    (64, (64, 64, 64), (False, False, False)),
    (37, (53, 5, 5), (True, True, True)),
    (37, (41, 1), (False, True)),
    (1, (7,), (True,)),
    (129, (257,), (False,)),
]
ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 8e-3}  # of sums in float32, and of results to 8 bits


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Keep measured seconds in a folder of the test's own, and nothing in the process."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    kept = (products._table, products._machine_and_code)
    for one in kept:
        one.cache_clear()
    yield tmp_path / "espalier" / "trellis"
    for one in kept:
        one.cache_clear()


@pytest.fixture
def measured(monkeypatch):
    """Replace the measurement; return the list of shapes that were asked for. The last arrangement is fastest."""
    asked = []

    def measure(names, rows, outputs, inputs, dtype, device):
        asked.append((rows, tuple(outputs), inputs))
        return {name: 1.0 / (1 + number) for number, name in enumerate(names)}

    monkeypatch.setattr(products, "measure", measure)
    return asked


def group(inputs, outputs, biased, dtype=torch.float32, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(size, inputs, generator=generator).to(device, dtype) for size in outputs]
    biases = [torch.randn(size, generator=generator).to(device, dtype) for size in outputs]
    return weights, [bias if has else None for bias, has in zip(biases, biased, strict=True)]


def agree(found, x, weights, biases):
    """Compare with the products in float64, to the rounding of the largest sum of magnitudes."""
    for one, weight, bias in zip(found, weights, biases, strict=True):
        wide, exact = weight.double(), x.double() @ weight.double().T
        size = x.double().abs() @ wide.abs().T
        if bias is not None:
            exact, size = exact + bias.double(), size + bias.double().abs()
        assert one.shape == exact.shape
        assert one.dtype == x.dtype
        assert ((one.double() - exact).abs() <= ROUNDING[x.dtype] * size).all()


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize(
    ("arrangement", "inputs", "outputs", "biased"),
    [(name, *one) for one in GROUPS for name in ON_CPU if len(one[1]) > 1 or name.endswith("separate")],
)
def test_every_arrangement_computes_the_products(arrangement, inputs, outputs, biased, dtype):
    weights, biases = group(inputs, outputs, biased, dtype)
    projections = Projections(weights, biases)
    projections._lay_out(arrangement)
    for rows in (*range(1, 18), 64):
        x = torch.randn(rows, inputs).to(dtype)
        agree(projections(x), x, weights, biases)
    x = torch.randn(2, inputs, 3).to(dtype).transpose(1, 2)  # … × in, not contiguous
    agree(projections(x), x, weights, biases)
    x = torch.randn(3, 1, 2 * inputs).to(dtype)[..., ::2]
    agree(projections(x), x, weights, biases)
    x = torch.randn(inputs).to(dtype)
    agree(projections(x), x, weights, biases)


@pytest.mark.parametrize("before", ON_CPU)
@pytest.mark.parametrize("after", ON_CPU)
def test_weights_move_from_any_layout_to_any_other_exactly(before, after):
    weights, biases = group(37, (53, 5, 5), (True, False, True), torch.bfloat16)
    projections = Projections(weights, biases)
    projections._lay_out(before)
    projections._lay_out(after)
    assert projections.choice()["arrangement"] == after
    projections._lay_out(PLAIN)
    for part, weight, given in zip(projections._parts, weights, biases, strict=True):
        assert torch.equal(part.weight, weight)
        if given is not None:
            assert torch.equal(part.bias, given)
        elif part.bias is not None:
            assert not part.bias.any()


@pytest.mark.parametrize("before", ON_CPU)
@pytest.mark.parametrize("after", ON_CPU)
@pytest.mark.parametrize("times", [0, 1, 2, 3])
def test_no_weight_is_lost_where_memory_runs_out(before, after, times, monkeypatch):
    """It runs out after so many steps of copying: in the old layout, where weights are joined, or in the new one."""
    weights, biases = group(37, (53, 5, 5), (True, False, True))
    projections = Projections(weights, biases)
    projections._lay_out(before)
    left = iter(range(times))

    def scarce(work):
        def copy(*given):
            if next(left, None) is None:
                raise torch.OutOfMemoryError("out of memory")
            return work(*given)

        return copy

    with monkeypatch.context() as patch:
        for layout in LAYOUTS.values():
            patch.setattr(layout, "dense", scarce(layout.dense))
        patch.setattr(torch, "cat", scarce(torch.cat))
        with contextlib.suppress(torch.OutOfMemoryError):
            projections._lay_out(after)
    x = torch.randn(3, 37)
    agree(projections(x), x, weights, biases)
    for name in (before, after):
        projections._lay_out(name)
        layout, how = name.split()
        assert [type(part) for part in projections._parts] == [LAYOUTS[layout]] * (3 if how == "separate" else 1)
        agree(projections(x), x, weights, biases)


def test_weights_are_held_once():
    before = memory.allocated_bytes("cpu")
    projections = Projections(*group(64, (128, 32, 32), (False,) * 3))
    for name in (*ON_CPU, PLAIN):
        projections._lay_out(name)
        assert memory.allocated_bytes("cpu") - before == 4 * 64 * (128 + 32 + 32), name


@pytest.mark.parametrize("arrangement", ON_CPU)
def test_a_product_allocates_its_result_alone(arrangement):
    projections = Projections(*group(256, (512, 128), (True, True)))
    projections._lay_out(arrangement)
    x = torch.randn(8, 256)
    projections(x)
    working = 1024  # bytes that oneDNN works with
    assert memory.peaks(lambda: projections(x), "cpu", before=0)["allocated"] <= 4 * 8 * (512 + 128) + working


def test_the_fastest_wins_and_of_equals_the_plainest():
    cases = [
        ({PLAIN: 1.0, "packed fused": 0.5}, "packed fused"),
        ({PLAIN: 1.0, "packed fused": 0.98}, PLAIN),
        ({PLAIN: 1.0, "packed fused": 0.96}, "packed fused"),
        ({PLAIN: 1.0, "stored fused": 0.51, "transposed fused": 0.5, "packed fused": 0.505}, "stored fused"),
    ]
    for seconds, expected in cases:
        assert products.fastest(seconds) == expected


def test_a_shape_is_measured_once_and_then_read_from_disk(measured, folder):
    weights, biases = group(16, (8, 4), (False, False))
    for _ in range(2):
        projections = Projections(weights, biases)
        projections.arrange(2)
    assert measured == [(2, (8, 4), 16)]
    products._table.cache_clear()  # as in another process
    projections = Projections(weights, biases)
    projections.arrange(2)
    assert len(measured) == 1
    last = products.possible(2, 2, torch.float32, "cpu")[-1]
    seconds = json.loads(products.cache_file(torch.float32, "cpu").read_text())["2 x 16 -> 8 + 4"]
    assert projections.choice() == {"arrangement": last, "rows": 2, "seconds": seconds}
    assert json.loads(json.dumps(projections.choice())) == projections.choice()
    projections.arrange(3)
    Projections(*group(16, (12,), (False,))).arrange(2)
    Projections(*group(16, (8, 4), (False, False), torch.bfloat16)).arrange(2)
    assert measured[1:] == [(3, (8, 4), 16), (2, (12,), 16), (2, (8, 4), 16)]
    assert len(list(folder.iterdir())) == 2  # a file for each dtype


DAMAGE = [
    "",
    '{"2 x 16 -> 8 + 4": ',
    "[1]",
    '{"2 x 16 -> 8 + 4": null}',
    '{"2 x 16 -> 8 + 4": {"stored separate": 1.0, "woven separate": 1.0}}',  # of no layout that there is
    '{"2 x 16 -> 8 + 4": {"stored fused": 1.0}}',
    '{"2 x 16 -> 8 + 4": {NAMES: "fast"}}',
    '{"2 x 16 -> 8 + 4": {NAMES: -1.0}}',
]


@pytest.mark.parametrize("text", DAMAGE)
def test_a_damaged_file_is_measured_anew(text, measured):
    names = products.possible(2, 2, torch.float32, "cpu")
    start, marker, end = text.partition("NAMES: ")
    if marker:
        value = end[: end.index("}")]
        text = start + ", ".join(f'"{name}": {value}' for name in names) + end[len(value) :]
        assert json.loads(text)
    file = products.cache_file(torch.float32, "cpu")
    file.parent.mkdir(parents=True)
    file.write_text(text)
    Projections(*group(16, (8, 4), (False, False))).arrange(2)
    assert measured == [(2, (8, 4), 16)]
    assert set(json.loads(file.read_text())["2 x 16 -> 8 + 4"]) == set(names)


def test_what_another_process_has_measured_stays_in_the_file(measured):
    Projections(*group(16, (8,), (False,))).arrange(1)
    file = products.cache_file(torch.float32, "cpu")
    file.write_text(json.dumps(json.loads(file.read_text()) | {"other": {PLAIN: 1.0}}))
    Projections(*group(16, (8,), (False,))).arrange(2)
    assert set(json.loads(file.read_text())) == {"1 x 16 -> 8", "2 x 16 -> 8", "other"}


def test_a_cache_that_cannot_be_written_is_no_error(measured, folder):
    folder.parent.parent.joinpath("espalier").write_text("a file where a folder is needed")
    projections = Projections(*group(16, (8, 4), (False, False)))
    projections.arrange(2)
    projections.arrange(2)
    assert len(measured) == 1  # known to this process


@pytest.mark.parametrize(
    ("owner", "name", "value", "said"),
    [
        (torch, "get_num_threads", 7, "_7-threads_"),
        (torch.backends.cpu, "get_cpu_capability", "AVX9", "_AVX9_"),
        (products, "last_level_cache", 12345, "_cache-12345_"),
        (products, "code_version", "0123456789abcdef", "_01234567_"),
    ],
)
def test_machines_and_versions_have_files_of_their_own(owner, name, value, said, monkeypatch):
    one = products.cache_file(torch.float32, "cpu")
    monkeypatch.setattr(owner, name, lambda *_: value)
    products._machine_and_code.cache_clear()
    assert said in products.cache_file(torch.float32, "cpu").name != one.name


def test_what_only_some_layouts_are_measured_for_is_known(measured):
    file = products.cache_file(torch.float32, "cpu")
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps({"2 x 16 -> 8": {PLAIN: 2.0, "transposed separate": 1.0}}))
    projections = Projections(*group(16, (8,), (False,)))
    projections.arrange(2)
    assert projections.choice()["arrangement"] == "transposed separate"
    assert not measured


def test_many_rows_are_looked_up_as_the_most_that_are_measured(measured):
    Projections(*group(16, (8,), (False,))).arrange(384)
    assert measured == [(products.MEASURED_ROWS, (8,), 16)]


def test_weights_without_channels_are_left_as_they_are(measured):
    for inputs, outputs in ((0, (4, 2)), (4, (0, 2))):
        weights, biases = group(inputs, outputs, (True, True))
        projections = Projections(weights, biases)
        projections.arrange(1)
        x = torch.randn(3, inputs)
        agree(projections(x), x, weights, biases)
    assert not measured


def test_weights_of_other_inputs_are_refused():
    with pytest.raises(ValueError, match="one number of input channels"):
        Projections([torch.ones(2, 3), torch.ones(2, 4)], [None, None])


def test_real_measurement_times_every_arrangement(monkeypatch):
    monkeypatch.setattr(products, "MOST_ROUNDS", 3)
    monkeypatch.setattr(products, "MEASURED_BYTES", 4 * 16 * 64)  # so that of these weights a half is measured
    asked = []
    stored = products.Stored.__call__
    monkeypatch.setattr(products.Stored, "__call__", lambda self, x: asked.append(self.weight.shape) or stored(self, x))
    names = products.possible(5, 2, torch.float32, "cpu")
    seconds = products.measure(names, 5, [96, 32], 16, torch.float32, "cpu")
    assert set(seconds) == set(names)
    assert all(0 < value < 1 for value in seconds.values())
    assert asked == [(48, 16), (16, 16), (64, 16)] * 4  # once to warm up and in three rounds


@pytest.mark.parametrize(
    ("name", "error", "left_out"),
    [
        ("transposed separate", "shared memory, required: 9", True),
        ("transposed separate", "out of memory", False),
        (PLAIN, "shared memory, required: 9", False),
    ],
)
def test_a_layout_that_this_device_cannot_run_is_left_out(name, error, left_out, monkeypatch):
    def fail(self, x):
        raise RuntimeError(error)

    monkeypatch.setattr(products, "MOST_ROUNDS", 1)
    monkeypatch.setattr(LAYOUTS[name.split()[0]], "__call__", fail)
    asked = [PLAIN, "transposed separate", "packed separate"]
    if left_out:
        assert set(products.measure(asked, 2, [8], 16, torch.float32, "cpu")) == {PLAIN, "packed separate"}
    else:
        with pytest.raises(RuntimeError, match=error):
            products.measure(asked, 2, [8], 16, torch.float32, "cpu")


def test_compiled_products_are_the_same():
    def run(x):
        return [projection(x) for projection in layers]

    layers = []
    for arrangement in products.possible(1, 2, torch.float32, "cpu")[-2:]:
        layers.append(Projections(*group(37, (53, 5), (True, False))))
        layers[-1]._lay_out(arrangement)
    x = torch.randn(3, 1, 37)
    with torch.inference_mode():
        compiled = torch.compile(run, fullgraph=True, dynamic=False)(x)
    for found in compiled:
        agree(found, x, *group(37, (53, 5), (True, False)))


@pytest.mark.parametrize(("layout", "kernel", "most"), [("gemv", "gemv", 4), ("flat-gemm", "flat_gemm", 64)])
@pytest.mark.parametrize("how", ["separate", "fused"])
def test_kernels_are_called_for_few_rows(layout, kernel, most, how, monkeypatch):
    called = []

    def product(x, weight, bias):
        assert x.dim() == 2
        assert x.is_contiguous()
        called.append(len(x))
        return torch.nn.functional.linear(x, weight, bias)

    monkeypatch.setattr(trellis, "kernels", SimpleNamespace(**{kernel: product}), raising=False)
    weights, biases = group(37, (53, 5), (True, False))
    projections = Projections(weights, biases)
    projections._lay_out(f"{layout} {how}")
    for shape in ((1,), (most,), (2, 2), (most + 1,), (0,), ()):
        x = torch.randn(*shape, 2 * 37)[..., ::2]
        agree(projections(x), x, weights, biases)
    times = 2 if how == "separate" else 1
    assert called == [rows for rows in (1, most, 4, 1) for _ in range(times)]


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("arrangement", [name for name in ARRANGEMENTS if not name.startswith("packed")])
@pytest.mark.parametrize(("inputs", "outputs", "biased"), GROUPS[:3])
def test_every_arrangement_computes_the_products_on_a_gpu(arrangement, inputs, outputs, biased):
    weights, biases = group(inputs, outputs, biased, torch.bfloat16, "cuda")
    projections = Projections(weights, biases)
    projections.arrange(4)
    assert set(projections.choice()["seconds"]) == {name for name in ARRANGEMENTS if not name.startswith("packed")}
    projections._lay_out(arrangement)
    for rows in (1, 2, 4, 5, 7, 16, 17, 64, 65, 200):
        x = torch.randn(rows, inputs, device="cuda", dtype=torch.bfloat16)
        agree(projections(x), x, weights, biases)
