"""The benchmark suite: what it counts, what it writes, and that its sides agree."""

import json
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from .helpers import reference_init, reference_step


ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
pytestmark = pytest.mark.usefixtures("standard_promotion")


#
# Measuring
#


@pytest.mark.parametrize("exponent", (0.5, 1.0, 2.0))
def test_growth_is_exact_on_a_power_law(module: Any, exponent: float):
    counts = (16, 64, 512, 2000)
    values = [3e-3 * n**exponent for n in counts]
    found = module("suite.measure").growth(counts, values)
    assert found == pytest.approx(exponent, rel=1e-12)


def test_sides_take_turns_in_an_order_that_reverses(module: Any):
    order: list[str] = []

    def sampler(name: str) -> Any:
        return lambda: order.append(name) or {"step": float(len(order))}

    turns = module("suite.measure").InTurn({name: sampler(name) for name in "abc"})
    for _ in range(3):
        turns()
    assert "".join(order) == "abccbaabc"
    assert [x["step"] for x in turns.samples["a"]] == [1.0, 6.0, 7.0]


def test_ratios_are_those_of_the_same_round(module: Any):
    """The machine is twice as slow in the second round, which the ratios do not see."""
    samples = {"optax": [1.0, 2.0, 1.0], "ours": [3.0, 6.0, 3.0]}
    found = module("suite.measure").summary(
        {name: [{"step": x} for x in values] for name, values in samples.items()},
        "optax",
    )
    assert found["ours"]["step"] == {
        "median": 3.0,
        "low": 3.0,
        "high": 4.5,
        "ratio": {"median": 3.0, "low": 3.0, "high": 3.0},
    }


def test_the_number_of_rounds_and_calls(module: Any):
    measure = module("suite.measure")
    rounds = [measure.rounds_that_fit(each, 5.0, 5, 25) for each in (0.1, 0.5, 9.0)]
    assert rounds == [25, 10, 5]
    calls = [measure.calls_that_take(5e-3, each) for each in (1e-4, 4e-3, 1.0)]
    assert calls == [50, 1, 1]


def test_instructions_are_counted(module: Any):
    text = jax.jit(lambda x, y: x * y + x).lower(1.0, 2.0).as_text("hlo")
    # Two parameters, a product, a sum, and a tuple in some versions.
    assert module("suite.sides").num_instructions(text) in (4, 5)


#
# Counting bytes
#


@pytest.mark.parametrize(
    ("parameters", "leaves", "shape"),
    (
        (2**25, 64, (2048, 256)),
        (10**4, 1, (39, 256)),
        (10**4, 512, (1, 19)),
        (3, 7, (1, 1)),
    ),
)
def test_shapes_of_leaves(module: Any, parameters: int, leaves: int, shape: Any):
    assert module("suite.trees").shape_of_leaf(parameters, leaves) == shape


@pytest.mark.parametrize(
    ("side", "state", "moved"),
    (
        ("AdEMAMix, float32", 12, 36),
        ("AdEMAMix, b1=0", 8, 28),
        ("SimplifiedAdEMAMix", 8, 28),
        ("optax.contrib.ademamix", 12, 36),
        ("optax.adamw", 8, 28),
    ),
)
def test_bytes_per_parameter(module: Any, side: str, state: int, moved: int):
    """The counters of the steps are the rest."""
    trees = module("suite.trees")
    params = {"x": jax.ShapeDtypeStruct((512, 256), jnp.float32)}
    found = jax.eval_shape(module("suite.sides").SIDES[side]().init, params)
    count = trees.count(params)
    assert count == 512 * 256
    assert 0 <= trees.num_bytes(found) - state * count <= 16
    assert 0 <= trees.moved_bytes(params, params, found) - moved * count <= 32


def test_the_in_place_scale_moves_nine_words(module: Any):
    scale = module("suite.bounds").InPlaceScale(1000)
    assert scale.bytes == 9 * 4 * 1000
    scale()
    scale.wait()


#
# Sides
#


def test_plans_name_known_sides_and_begin_with_the_baseline(module: Any):
    cases = module("suite.cases")
    known = {*module("suite.sides").SIDES, *module("suite.torch_runs").PEERS}
    assert {*cases.ALL} == known | {*cases.BOUNDS}
    assert {*module("suite.plots").STYLES} >= {*cases.ALL}
    for plan in (cases.FULL, cases.SHORT):
        for case in (*plan.step, *plan.compile, *plan.eager):
            assert case.sides[0] == cases.BASELINE and {*case.sides} <= {*cases.ALL}


def test_the_loop_in_c_is_ademamix(module: Any):
    bounds = module("suite.bounds")
    grads = np.random.default_rng(0).normal(size=1000).astype(np.float32)
    try:
        loop = bounds.CLoop(grads)
    except module("suite.measure").Absent as reason:
        assert "C compiler" in str(reason)
        return
    reference = reference_init(np.zeros(1000))
    options: Any = dict(lr=1e-3, b1=0.9, b2=0.999, b3=0.9999, alpha=5.0)
    for t in (1, 2, 3):
        loop()
        reference = reference_step(reference, grads, t, **options, weight_decay=0.1)
    np.testing.assert_allclose(loop.p, reference.p, rtol=1e-5)
    np.testing.assert_allclose(loop.m2, reference.m2, rtol=1e-5)


def test_absent_sides_say_why(module: Any, monkeypatch: pytest.MonkeyPatch):
    bounds, torch_runs = module("suite.bounds"), module("suite.torch_runs")
    absent = module("suite.measure").Absent
    bounds.library.cache_clear()
    monkeypatch.setenv("PATH", "")
    with pytest.raises(absent, match="there is no C compiler"):
        bounds.CLoop(np.zeros(3, np.float32))
    peer = torch_runs.Peer("a_module_that_nobody_has", lambda *_: None)
    monkeypatch.setitem(torch_runs.PEERS, "peer", peer)
    with pytest.raises(absent, match="not installed"):
        torch_runs.TorchRun("peer", {})


def test_all_loops_around_a_small_model_do_the_same(module: Any):
    host_runs = module("suite.host_runs")
    runs = host_runs.runs_of(2)
    for run in runs.values():
        for _ in range(host_runs.STEPS_PER_CALL):
            run()
        run.wait()
    start = jax.tree.leaves(host_runs.make_net(2))
    assert len(start) == 2
    for name, run in runs.items():
        params, ours = (
            run.arrays()[:2],
            runs[module("suite.cases").FLOAT32].arrays()[:2],
        )
        for x, y, before in zip(params, ours, start, strict=True):
            assert x.shape == before.shape and not np.array_equal(x, before)
            np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-7, err_msg=name)


#
# The page
#


def test_the_page_is_what_the_script_writes(module: Any):
    found = module("suite.results").read(DOCS / "benchmarks.json")
    assert (DOCS / "benchmarks.md").read_text() == module("suite.page").page(found)


def test_a_page_of_nothing_can_be_written(module: Any, tmp_path: Path):
    empty = {"machine": {}, "seconds": 0, "cases": [], "left_out": ["bench: why"]}
    page = module("suite.page").page(empty)
    assert "- `bench: why`" in page and "images/" not in page
    module("suite.plots").draw(empty, tmp_path)
    assert not list(tmp_path.iterdir())


def test_plots_are_drawn(module: Any, tmp_path: Path):
    found = module("suite.results").read(DOCS / "benchmarks.json")
    module("suite.plots").draw(found, tmp_path)
    names = [f"benchmarks_{kind}.png" for kind in ("compile", "host", "step")]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    for name in names:
        assert (DOCS / "images" / name).read_bytes().startswith(b"\x89PNG")


def test_results_keep_what_the_page_shows(module: Any):
    extra = {"kind": "step", "case": {"leaves": 1}, "sides": {"x": 1.23456789}}
    found = {
        "machine_info": {"cores": "2"},
        "commit_info": {"branch": "main"},
        "benchmarks": [{"name": "bench", "stats": {}, "extra_info": extra}],
        "left_out": [],
        "seconds": 1.6,
    }
    assert module("suite.results").from_pytest_benchmark(found) == {
        "machine": {"cores": "2"},
        "seconds": 2,
        "cases": [{**extra, "sides": {"x": 1.2346}}],
        "left_out": [],
    }


@pytest.mark.parametrize(
    ("value", "text"),
    (
        (2.5, "2.50 s"),
        (264.1, "264 s"),
        (0.0123, "12.3 ms"),
        (1e-6, "1.00 µs"),
        (5e-8, "0.05 µs"),
        (1234.5, "1,234 s"),
    ),
)
def test_times_have_units(module: Any, value: float, text: str):
    assert module("suite.text").seconds(value) == text


def test_ticks_are_round(module: Any):
    found = [module("suite.text").tick(x) for x in (5 * 10.0**-4, 10 * 10.0**-4, 2.0)]
    assert found == ["500 µs", "1 ms", "2 s"]


def test_ratios_have_two_digits(module: Any):
    found = {"median": 0.0451, "low": 0.004, "high": 12.345}
    assert module("suite.text").ratio(found) == "**0.045** (0.004 to 12.35)"


def test_the_glance_shows_the_cases_with_most_of_our_sides(module: Any):
    cases = module("suite.cases")

    def case(parameters: int, leaves: int, *sides: str) -> Any:
        size = {"parameters": parameters, "leaves": leaves}
        return {"case": size, "sides": dict.fromkeys(sides)}

    both = (cases.FLOAT32, cases.COMPACT)
    found = [
        case(100, 1, *both, cases.BITSANDBYTES),
        case(200, 1, *both),
        case(900, 1, cases.FLOAT32, *cases.PEERS),
        case(10, 64, cases.FLOAT32),
    ]
    assert module("suite.page").largest(found) == [found[1], found[3]]


def test_names_of_sizes(module: Any):
    text = module("suite.text")
    found = [text.parameters(n) for n in (10**4, 2**23, 10**8)]
    assert found == ["10,000", "8.39 million", "100 million"]
    assert (text.leaves(1), text.leaves(2)) == ("1 leaf", "2 leaves")


#
# The GPU
#


def test_the_gpu_benchmark_runs_on_a_cpu(module: Any, tmp_path: Path):
    gpu, cases = module("gpu"), module("suite.cases")
    names = (cases.BASELINE, cases.FLOAT32)
    gpu.main(2**14, 2, rounds=2, names=names, out=tmp_path)
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert found["machine"]["device"] == jax.devices()[0].device_kind
    assert [*found["sides"]] == [*names, cases.IN_PLACE]
    assert found["sides"][cases.IN_PLACE]["bound"] == dict.fromkeys(
        ("median", "low", "high"), 1.0
    )
    for name in names:
        assert 36 <= found["facts"][name]["moved"] <= 36.01
        assert 12 <= found["facts"][name]["state"] <= 12.01
    report = (tmp_path / "gpu.md").read_text()
    assert report.startswith(f"# {found['machine']['device']}\n")
    assert "16,384 parameters, 2 leaves, 2 rounds" in report
    assert f"- {cases.FLOAT32}: " in report
    assert f"- {cases.COMPACT}: not measured." in report


def test_the_gpu_benchmark_keeps_its_budget(module: Any, tmp_path: Path):
    gpu, cases = module("gpu"), module("suite.cases")
    names = (cases.BASELINE, cases.FLOAT32)
    gpu.main(2**10, 1, rounds=1, budget=0.0, names=names, out=tmp_path)
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert found["left_out"] == [cases.FLOAT32]
    report = (tmp_path / "gpu.md").read_text()
    assert f"- {cases.FLOAT32}: out of the time budget." in report


def test_a_bound_counts_the_bytes_that_must_be_moved(module: Any):
    """A step that moves 20 of 36 bytes has 20/36 of the time of the in-place scale."""
    found = module("gpu").bound_ratios([2.0, 4.0], [3.6, 3.6], 20 / 36)
    np.testing.assert_allclose(found, [1.0, 2.0])


@pytest.mark.parametrize("layout", ("FSDP and tensor-parallel", "ZeRO-1"))
def test_the_table_of_layouts(module: Any, layout: str):
    """The docs show what `benchmarks/sharding.py` prints."""
    sharding = module("sharding")
    page = (DOCS / "many-devices.md").read_text()
    [row] = re.findall(rf"^\| {layout} \| (.*) \|$", page, re.MULTILINE)
    cells = dict(zip(sharding.OPTIMIZERS, row.split(" | "), strict=True))
    for name in ("float32", "compact"):
        optim = sharding.OPTIMIZERS[name]
        assert cells[name] == sharding.measure(sharding.LAYOUTS[layout], optim)


#
# Checkpoints
#


def test_checkpoints_of_all_sides(
    module: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Each side loads what it has saved, or `measure` raises."""
    checkpoint = module("checkpoint")
    names = [name for name in checkpoint.SIDES if name != "Orbax"]
    monkeypatch.setattr(checkpoint, "sides", lambda: names)
    found = checkpoint.measure(tmp_path, 1200, 3, rounds=2)
    assert list(found) == names and len(list(tmp_path.iterdir())) == 3
    assert all(times[key]["low"] > 0 for times in found.values() for key in times)
