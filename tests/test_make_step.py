"""`make_step` takes the steps of a loop written by hand, and keeps what it is given."""

import copy
import gc
import inspect
import io
import weakref
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from eqx_ademamix import (
    AdEMAMix,
    Compensated,
    SimplifiedAdEMAMix,
    TrainCarry,
    decay_mask,
    hyperparams,
    init,
    make_step,
    tree_cast,
    update,
)

from .helpers import (
    COMPACT,
    SCHEDULES,
    assert_trees_close,
    count_traces,
    x64,
)


pytestmark = pytest.mark.usefixtures("standard_promotion")

X = jax.random.normal(jax.random.key(1), (4, 8, 3))


class Model(eqx.Module):
    """A small model with leaves of several kinds."""

    weight: jax.Array
    head: jax.Array
    steps: jax.Array
    key: jax.Array
    function: Any
    scale: float

    def __init__(self, seed: Any = 0):
        self.weight = jax.random.normal(jax.random.key(seed), (4, 3))
        self.head = jnp.ones(4)
        self.steps = jnp.zeros((), jnp.int32)
        self.key = jax.random.key(7)
        self.function = jnp.tanh
        self.scale = 0.5

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.head @ self.function(self.weight @ x) * self.scale


MODEL = Model()
HEAD = eqx.tree_at(lambda m: m.head, jax.tree.map(lambda _: False, MODEL), True)


def mean_loss(model: Any, x: jax.Array) -> jax.Array:
    error = jax.vmap(model)(x.astype(model.head.dtype)) - x[:, 0]
    return jnp.mean(error.astype(jnp.float32) ** 2)


def with_aux(model: Any, x: jax.Array) -> Any:
    return mean_loss(model, x), {"mean": jnp.mean(x), "steps": 1}


def half(model: Any) -> Any:
    arrays, rest = eqx.partition(model, eqx.is_inexact_array)
    return eqx.combine(tree_cast(arrays, jnp.bfloat16), rest)


@eqx.filter_jit
def step_by_hand(optim: Any, model: Any, state: Any, x: Any) -> Any:
    loss, grads = eqx.filter_value_and_grad(mean_loss)(model, x)
    updates, state = update(optim, grads, state, model, value=loss)
    return eqx.apply_updates(model, updates), state, loss


def by_hand(optim: Any, model: Any = MODEL) -> Any:
    """The loop that `make_step` replaces."""
    state, losses = init(optim, model), []
    for x in X:
        model, state, loss = step_by_hand(optim, model, state, x)
        losses.append(loss)
    return model, state, jnp.stack(losses)


def looped(step: Any, carry: Any) -> Any:
    """The loop with it: the last carry, and the losses."""
    losses = []
    for x in X:
        carry, loss = step(carry, x)
        losses.append(loss)
    return carry, jnp.stack(losses)


def data(x: Any) -> Any:
    """The data of a PRNG key, and strongly typed arrays: by hand, states of optax may
    stay weakly typed."""
    if not eqx.is_array(x):
        return x
    is_key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    return jax.random.key_data(x) if is_key else jnp.asarray(x, x.dtype)


def assert_same(x: Any, y: Any, tolerance: float = 0.0) -> None:
    assert_trees_close(jax.tree.map(data, x), jax.tree.map(data, y), tolerance)


def test_copies_of_a_step_and_of_a_carry():
    loss_fn = lambda tree: jnp.sum(tree["f"](tree["w"]))
    step = make_step(loss_fn, AdEMAMix(1e-2))
    copied = copy.deepcopy(step)
    step.init({"w": jnp.ones(3), "f": jnp.sin})
    carry = copied.init({"w": jnp.ones(3), "f": jnp.exp})
    snapshot = copy.deepcopy(carry)
    np.testing.assert_allclose(copied(carry)[1], 3 * np.exp(1), rtol=1e-6)
    np.testing.assert_array_equal(step.unpack(snapshot)[0]["w"], 1.0)


@pytest.mark.parametrize("name", ["value", "other"])
def test_an_optimizer_gets_the_extra_arguments_that_it_names(name: str):
    """Also if its `update` does not accept all of them, as optax asks it to."""
    given: list[dict[str, Any]] = []

    def with_value(grads: Any, state: Any, params: Any, *, value: Any) -> Any:
        given.append({"value": value})
        return grads, state

    def with_other(grads: Any, state: Any, params: Any, *, other: Any = 1) -> Any:
        given.append({"other": other})
        return grads, state

    update: Any = {"value": with_value, "other": with_other}[name]
    optim = optax.GradientTransformationExtraArgs(lambda params: (), update)
    step = make_step(lambda w: jnp.sum(w**2), optim)
    carry, loss = step(step.init(jnp.ones(3)))
    assert loss == 3.0 and [list(x) for x in given] == [[name]]
    np.testing.assert_array_equal(step.unpack(carry)[0], 3.0)


#
# The same numbers
#


ADEMAMIX: Any = AdEMAMix(
    1e-2, weight_decay=0.1, weight_decay_mask=decay_mask(MODEL), **SCHEDULES
)
OPTIMIZERS: Any = {
    "AdEMAMix": ADEMAMIX,
    "arrays, frozen": AdEMAMix(jnp.asarray(1e-2), b1=jnp.asarray(0.8), trainable=HEAD),
    "compact": AdEMAMix(1e-2, state_format=COMPACT),
    "Simplified": SimplifiedAdEMAMix(1e-3, b1=0.0),
    "Compensated": Compensated(SimplifiedAdEMAMix(1e-4)),
    "MultiSteps": optax.MultiSteps(ADEMAMIX, every_k_schedule=2),
    "inject_hyperparams": optax.inject_hyperparams(optax.adamw)(1e-2),
    "plateau": optax.chain(
        optax.sgd(1e-2), optax.contrib.reduce_on_plateau(patience=1, atol=1e9)
    ),
    "schedule_free": optax.contrib.schedule_free_sgd(1e-2),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_same_bits_as_by_hand(name: str):
    """And one trace."""
    optim, model = OPTIMIZERS[name], half(MODEL) if name == "Compensated" else MODEL
    counted, traces = count_traces(mean_loss)
    step = make_step(counted, optim)
    carry, losses = looped(step, step.init(model))
    assert len(traces) == 1 and len(step._layouts) == 1
    assert_same((*step.unpack(carry), losses), by_hand(optim, model))


def test_a_transformation_of_gradients_is_the_start_of_a_chain():
    """Its state is the first of a pair. A restart changes nothing."""
    trace = optax.trace(0.9)
    chain = optax.chain(trace, ADEMAMIX)
    step = make_step(mean_loss, ADEMAMIX, grad_transform=trace)
    carry = step.init(MODEL)
    for i, x in enumerate(X):
        carry = step.pack(*step.unpack(carry)) if i == 2 else carry
        carry, _ = step(carry, x)
    assert_same(step.unpack(carry), by_hand(chain)[:2])
    _, state = step.unpack(carry)
    assert isinstance(state[0], optax.TraceState) and state[1].count == 4
    assert hyperparams(ADEMAMIX, state).learning_rate == np.float32(1e-2)


def line_search(rate: float) -> Any:
    search = optax.scale_by_backtracking_linesearch(max_backtracking_steps=5)
    return optax.chain(optax.sgd(rate), search)


def test_a_line_search_gets_the_value_and_the_function():
    step = make_step(lambda model, _: jnp.sum(model**2), line_search(3.0))
    _, losses = looped(step, step.init(jnp.ones(3)))
    assert losses[2] < losses[1] < losses[0]


class Plain:
    """An optimizer without extra arguments."""

    def init(self, params: Any) -> Any:
        return jnp.zeros(())

    def update(self, grads: Any, state: Any, params: Any = None) -> Any:
        return jax.tree.map(lambda g: -g, grads), state + 1


def test_an_optimizer_without_extra_arguments():
    step = make_step(jnp.sum, Plain())
    carry, _ = step(step.init(jnp.ones(2)))
    assert step.unpack(carry)[1] == 1


#
# Several steps, packed arrays
#


def test_several_steps_in_one_call():
    step = make_step(with_aux, ADEMAMIX, has_aux=True, steps_per_call=4)
    carry, (losses, aux) = step(step.init(MODEL), X)
    assert_same((*step.unpack(carry), losses), by_hand(ADEMAMIX), 1e-6)
    np.testing.assert_allclose(aux["mean"], X.mean((1, 2)), 1e-5)
    assert aux["steps"].tolist() == [1, 1, 1, 1]


class Growing(Plain):
    """Its state starts as a weakly typed number, and its dtype changes in a step."""

    def init(self, params: Any) -> Any:
        return jnp.asarray(1.0), jnp.zeros((), jnp.bfloat16)

    def update(self, grads: Any, state: Any, params: Any = None) -> Any:
        weak, narrow = state
        return super().update(grads, weak, params)[0], (weak + 1.0, narrow + weak)


def test_a_state_whose_types_change():
    """Weak types become strong before the first call. Another dtype makes the second
    call trace again, as it does in a loop by hand."""
    counted, traces = count_traces(jnp.sum)
    step = make_step(counted, Growing(), donate=False)
    carry = step.init(jnp.ones(2))
    for _ in range(3):
        carry, _ = step(carry)
    assert len(traces) == 2
    assert [x.dtype for x in step.unpack(carry)[1]] == [jnp.float32] * 2


@pytest.mark.parametrize("steps", (1, 4))
def test_packed_arrays(steps: int):
    """Small arrays of one dtype share a buffer. PRNG keys and large arrays do not."""
    step = make_step(mean_loss, ADEMAMIX, pack_below=8, steps_per_call=steps)
    carry = step.init(MODEL)
    # float32: `head` and its moments. int32: `steps` and the two counters.
    kinds = [(x.shape, str(x.dtype)) for x in carry.arrays]
    large = [((4, 3), "float32")]
    assert kinds[:2] == [((16,), "float32"), ((3,), "int32")]
    assert kinds[2:] == [*large, ((), "key<fry>"), *large * 3]
    carry, losses = looped(step, carry) if steps == 1 else step(carry, X)
    assert_same((*step.unpack(carry), losses), by_hand(ADEMAMIX), 1e-6)
    again = step.pack(*step.unpack(carry))
    assert again.layout is carry.layout and len(step._layouts) == 1
    assert_same(step.unpack(again), step.unpack(carry))


#
# A state of the model
#


class Counter(eqx.Module):
    """A model that counts its calls."""

    weight: jax.Array
    calls: eqx.nn.StateIndex

    def __init__(self):
        self.weight = jnp.ones(3)
        self.calls = eqx.nn.StateIndex(jnp.asarray(0))


def counting_loss(model: Counter, model_state: eqx.nn.State, x: jax.Array) -> Any:
    calls = model_state.get(model.calls) + 1
    loss = jnp.mean((x @ model.weight) ** 2)
    return loss, model_state.set(model.calls, calls)


@pytest.mark.parametrize("steps", (1, 4))
def test_a_model_with_a_state(steps: int):
    model, model_state = eqx.nn.make_with_state(Counter)()
    optim = optax.sgd(0.1)

    def loss_fn(model: Any, model_state: Any, x: Any) -> Any:
        loss, after = counting_loss(model, model_state, x)
        return loss, (after, after.get(model.calls))

    step = make_step(loss_fn, optim, has_aux=True, steps_per_call=steps)
    carry = step.init(model, model_state=model_state)
    carry, (_, calls) = step(carry, X[0]) if steps == 1 else step(carry, X)
    assert calls == 1 if steps == 1 else calls.tolist() == [1, 2, 3, 4]
    trained, state, after = step.unpack(carry)
    assert after.get(trained.calls) == steps and model_state.get(model.calls) == 0
    again = step.pack(trained, state, model_state=after)
    assert_same(step.unpack(again), (trained, state, after))


def test_batch_norm():
    """As by hand, bit for bit."""
    # Equinox 0.12 added `mode`, and warns if it is missing.
    has_mode = "mode" in inspect.signature(eqx.nn.BatchNorm.__init__).parameters
    mode: Any = {"mode": "ema"} if has_mode else {}
    make = lambda: eqx.nn.BatchNorm(3, axis_name="batch", **mode)
    start, optim = eqx.nn.make_with_state(make)(), optax.sgd(0.1)

    def loss_fn(model: Any, model_state: Any, x: Any) -> Any:
        run = jax.vmap(model, axis_name="batch", in_axes=(0, None), out_axes=(0, None))
        out, model_state = run(x, model_state)
        return jnp.mean((out - 1.0) ** 2), model_state

    @eqx.filter_jit
    def one(model: Any, state: Any, model_state: Any, x: Any) -> Any:
        compute = eqx.filter_value_and_grad(loss_fn, has_aux=True)
        (_, model_state), grads = compute(model, model_state, x)
        updates, state = update(optim, grads, state, model)
        return eqx.apply_updates(model, updates), state, model_state

    step = make_step(loss_fn, optim)
    carry, _ = looped(step, step.init(start[0], model_state=start[1]))
    (model, model_state), state = start, init(optim, start[0])
    for x in X:
        model, state, model_state = one(model, state, model_state, x)
    assert_same(step.unpack(carry), (model, state, model_state))


def test_a_line_search_with_a_state():
    """`value_fn` gets a state of its own: Equinox forbids to use one twice."""
    model, model_state = eqx.nn.make_with_state(Counter)()
    step = make_step(counting_loss, line_search(0.1))
    carry = step.init(model, model_state=model_state)
    carry, first = step(carry, X[0])
    assert step(carry, X[0])[1] < first


#
# Whose arrays
#


def test_nothing_of_the_user_is_donated():
    shared = jnp.ones(3)
    model = {"a": shared, "b": shared, "numpy": np.ones(3, np.float32), "int": shared}
    optim = optax.contrib.schedule_free_sgd(1e-2)
    loss_fn = lambda model: sum(jnp.sum(x**2) for x in jax.tree.leaves(model))
    step, state = make_step(loss_fn, optim), init(optim, model)
    for carry in (step.init(model), step.pack(model, state)):
        unpacked = step.unpack(carry)
        step(carry)
        assert all(x.is_deleted() for x in carry.arrays)
        for x in jax.tree.leaves((model, state, unpacked)):
            assert isinstance(x, np.ndarray) or not x.is_deleted()
    assert (shared == 1).all() and (model["numpy"] == 1).all()


def test_without_donation_a_carry_lives_on():
    step = make_step(mean_loss, optax.sgd(1e-2), donate=False)
    carry = step.init(MODEL)
    first, second = step(carry, X[0]), step(carry, X[0])
    assert not any(x.is_deleted() for x in carry.arrays)
    assert_same(step.unpack(first[0]), step.unpack(second[0]))


def test_what_a_step_puts_into_a_carry_is_not_donated():
    """A batch and an array of the optimizer that a step puts into the carry, and an
    array of the carry that it returns, are copies: the next call donates none of them.
    """

    class Remembering(eqx.Module):
        rate: jax.Array

        def init(self, params: Any) -> Any:
            return jnp.zeros(())

        def update(self, grads: Any, state: Any, params: Any = None) -> Any:
            return -state * grads, self.rate

    def loss_fn(model: Any, last: Any, x: Any) -> Any:
        return jnp.sum(model * last * x), (x, last)

    rate, x = jnp.asarray(0.1), jnp.ones(3)
    step = make_step(loss_fn, Remembering(rate), has_aux=True)
    carry, kept = step.init(x, model_state=x), [rate, x]
    for _ in range(3):
        carry, (_, last) = step(carry, x)
        kept.append(last)
    assert not any(x.is_deleted() for x in kept)


def test_a_carry_is_a_module():
    step = make_step(mean_loss, optax.adam(1e-2))
    carry = step.init(MODEL)
    assert isinstance(carry, eqx.Module) and isinstance(carry, TrainCarry)
    assert jtu.tree_leaves(carry) == list(carry.arrays)
    after, _ = step(step.init(MODEL), X[0])
    assert jtu.tree_structure(after) == jtu.tree_structure(carry)
    without_keys = lambda c: [x for x in c.arrays if str(x.dtype) != "key<fry>"]
    file = io.BytesIO()
    eqx.tree_serialise_leaves(file, without_keys(after))
    file.seek(0)
    loaded = eqx.tree_deserialise_leaves(file, without_keys(carry))
    assert_same(loaded, without_keys(after))


def test_nothing_is_kept_alive():
    loss_fn = lambda model: jnp.sum(model**2)
    step = make_step(loss_fn, optax.sgd(1e-2), pack_below=8)
    carry, _ = step(step.init(jnp.ones(2)))
    step.unpack(carry)
    dead = [weakref.ref(x) for x in (step, loss_fn, carry.layout)]
    del step, loss_fn, carry
    gc.collect()
    assert [x() for x in dead] == [None] * 3


#
# Inside of transformations, on several devices
#


def test_a_sweep_of_learning_rates():
    """The arrays of an optimizer are arguments, also if they are traced."""

    def train(rate: jax.Array) -> Any:
        step = make_step(mean_loss, AdEMAMix(rate), steps_per_call=2)
        carry = step.init(MODEL)
        carry, _ = jax.lax.scan(step, carry, X.reshape(2, 2, 8, 3))
        return eqx.filter(step.unpack(carry), eqx.is_inexact_array)

    rates = jnp.asarray([1e-3, 1e-2])
    swept = jax.jit(jax.vmap(train))(rates)
    for i, rate in enumerate(rates):
        expected = eqx.filter(by_hand(AdEMAMix(rate))[:2], eqx.is_inexact_array)
        assert_same(jax.tree.map(lambda x, i=i: x[i], swept), expected, 1e-5)


def test_a_batch_of_carries():
    models = eqx.filter_vmap(Model)(jnp.arange(2))
    step = make_step(mean_loss, optax.sgd(1e-2))
    carries = eqx.filter_vmap(step.init)(models)
    carries, losses = eqx.filter_vmap(lambda c: step(c, X[0]))(carries)
    trained, _ = eqx.filter_vmap(step.unpack)(carries)
    alone, loss = step(step.init(Model(1)), X[0])
    np.testing.assert_allclose(losses[1], loss, 1e-6)
    weight = step.unpack(alone)[0].weight
    np.testing.assert_allclose(trained.weight[1], weight, 1e-6)


def test_one_carry_and_a_batch_of_batches():
    """Nothing is donated, so JAX does not warn that it cannot use the arrays."""
    step = make_step(mean_loss, optax.sgd(1e-2), donate=False)
    carry = step.init(MODEL)
    _, losses = eqx.filter_vmap(step, in_axes=(None, 0))(carry, X)
    expected = [step(carry, x)[1] for x in X]
    np.testing.assert_allclose(losses, jnp.stack(expected), 1e-6)


@pytest.mark.parametrize("pack_below", (0, 20))
def test_sharded_models(pack_below: int):
    """Arrays keep their shardings (the compiler would split `b`), and the second call
    neither traces nor compiles."""
    mesh = Mesh(np.array(jax.devices()), ("x",))
    rows, everywhere = (
        NamedSharding(mesh, PartitionSpec(*spec)) for spec in (("x",), ())
    )
    model = {
        "w": jax.device_put(jnp.ones((16, 3)), rows),
        "v": jax.device_put(jnp.ones(8), rows),
        "b": jax.device_put(jnp.zeros(16), everywhere),
    }

    def loss_fn(m: Any, x: Any) -> Any:
        return jnp.mean((x @ m["w"].T + m["b"][None]) ** 2) + jnp.mean(m["v"] ** 2)

    counted, traces = count_traces(loss_fn)
    step: Any = make_step(counted, AdEMAMix(1e-2), pack_below=pack_below)
    carry = step.init(model)
    for _ in range(3):
        carry, _ = step(carry, jnp.ones((4, 3)))
    assert len(traces) == 1 and step._compiled._cache_size() == 1
    for tree in (step.unpack(carry)[0], step.unpack(carry)[1].m2):
        assert tree["w"].sharding.is_equivalent_to(rows, 2)
        assert tree["v"].sharding.is_equivalent_to(rows, 1)
        assert tree["b"].sharding.is_fully_replicated
    assert not model["w"].is_deleted()
    plain = make_step(loss_fn, AdEMAMix(1e-2))
    alone = plain.init(jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), model))
    for _ in range(3):
        alone, _ = plain(alone, jnp.ones((4, 3)))
    assert_same(step.unpack(carry), plain.unpack(alone), 1e-6)


def test_keys_in_a_batch():
    """Keys of both kinds can be batches, and `aux`."""
    keys = jax.random.split(jax.random.key(0), 2)
    loss_fn = lambda w, new, old: (jnp.sum(w * jax.random.uniform(new)), (new, old))
    step = make_step(loss_fn, optax.sgd(1.0), has_aux=True, steps_per_call=2)
    _, (_, aux) = step(step.init(jnp.ones(())), keys, jax.random.key_data(keys))
    assert_same(aux, (keys, jax.random.key_data(keys)))


def test_the_batch():
    """Trees of arrays and numbers, none of which is static; and wide types."""
    counted, traces = count_traces(
        lambda model, batch, scale: scale * jnp.sum(model * batch["x"])
    )
    with x64():
        step = make_step(counted, AdEMAMix(1e-2))
        carry = step.init(jnp.ones(3, jnp.float64))
        for scale in (1.0, 2.0):
            carry, loss = step(carry, {"x": np.ones(3), "none": None}, scale)
        assert loss.dtype == jnp.float64 and len(traces) == 1
        assert step.unpack(carry)[0].dtype == jnp.float64


#
# Errors at run time
#


def test_a_failed_call_is_not_taken_for_a_donated_carry():
    """The loss raises after the carry was donated. Its own error is shown."""
    loss_fn = lambda model: jnp.sum(eqx.error_if(model, model > 0, "too large"))
    step = make_step(loss_fn, optax.sgd(1e-2))
    with pytest.raises(Exception, match="too large"):
        jax.block_until_ready(step(step.init(jnp.ones(2))))


def test_an_error_of_the_loss_is_shown():
    def broken(model: Any, x: Any) -> Any:
        raise TypeError("my own")

    step = make_step(broken, optax.sgd(1e-2))
    with pytest.raises(TypeError, match="my own"):
        step(step.init(MODEL), X)
