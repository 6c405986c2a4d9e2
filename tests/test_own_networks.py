"""Networks and activations of one's own: those with numbers in them, and those that are refused."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import integrate

import saddlejax as sj
from saddlejax.networks import AbstractNetwork
from saddlejax.networks.activation_class import slope_jumps
from saddlejax.objective import as_problem, task_loss

KEY = jax.random.key(4)
ONE = sj.Task([[1.0]], [[1.0]])
HALF = sj.Escape(loss_fraction=0.5)
SMALL = sj.Save(steps=False, singular_values=False)
WEIGHT = 1e-2


class Linear(eqx.Module):
    """`σ(z) = slope · z`, with the slope in an array."""

    slope: jax.Array

    def __call__(self, z):
        return self.slope * z


def pair(slope, weight=WEIGHT):
    """A unit a layer: `f(x) = w_2 · slope · w_1 x`."""
    return sj.MLP.from_weights([[[weight]], [[weight]]], Linear(slope))


def half_time(slope, weight=WEIGHT):
    """When the loss `½(1 − v)²` has halved, `v = slope · w_1 w_2` and `dv/dt = 2 slope v (1 − v)`; and its derivative."""
    start, end = slope * weight**2, 1 - 0.5**0.5
    time = (np.log(end / (1 - end)) - np.log(start / (1 - start))) / (2 * slope)
    return time, -time / slope - 1 / (2 * slope**2 * (1 - start))


def flow_time(slope):
    return sj.gradient_flow(pair(slope), ONE, HALF, rtol=1e-6, save=SMALL).escape_time


SLOPES = jnp.array([0.5, 1.0, 2.5])


def test_flows_of_an_activation_with_a_number_in_it():
    times, derivatives = half_time(np.asarray(SLOPES))
    np.testing.assert_allclose([flow_time(slope) for slope in SLOPES], times, rtol=1e-4)
    np.testing.assert_allclose(jax.jit(jax.vmap(flow_time))(SLOPES), times, rtol=1e-4)
    np.testing.assert_allclose(jax.vmap(jax.grad(flow_time))(SLOPES), derivatives, rtol=1e-4)
    forward = jax.jvp(flow_time, (SLOPES[2],), (jnp.ones(()),))[1]
    np.testing.assert_allclose(forward, derivatives[2], rtol=1e-4)


def test_the_numbers_of_an_activation_can_be_trained():
    """Of three equal factors, `f = u³`: `du/dt = u² (1 − u³)`."""
    start, end = 0.05, (1 - 0.5**0.5) ** (1 / 3)
    net = pair(jnp.asarray(start), start)
    flow = sj.gradient_flow(net, ONE, HALF, trainable=eqx.is_inexact_array, rtol=1e-6, save=SMALL)
    expected = integrate.quad(lambda u: 1 / (u**2 * (1 - u**3)), start, end)[0]
    np.testing.assert_allclose(flow.escape_time, expected, rtol=1e-4)
    np.testing.assert_allclose([flow.net.activation.slope, *jnp.ravel(jnp.asarray(flow.net.weights))], end, rtol=1e-3)
    assert flow.imbalance is None


def test_a_flow_follows_what_a_network_returns_when_called():
    """`f(x) = x + v tanh(u x)` with one unit a layer, followed by SciPy as well."""
    x, y = np.array([1.0, 2.0]), np.array([1.8, 2.9])

    def velocity(t, parameters):
        u, v = parameters
        h = np.tanh(u * x)
        error = x + v * h - y
        return -np.mean([error * v * (1 - h**2) * x, error * h], axis=1)

    def above(t, parameters):
        u, v = parameters
        return np.mean((x + v * np.tanh(u * x) - y) ** 2 / 2) - 0.05

    above.terminal = True
    (expected,) = integrate.solve_ivp(velocity, (0, 30), [0.1, 0.2], events=above, rtol=1e-9, atol=1e-12).t_events[0]
    net = Residual.from_weights([[[0.1]], [[0.2]]], "tanh")
    flow = sj.gradient_flow(net, sj.Task(x[:, None], y[:, None]), sj.Loss(0.05), rtol=1e-6, save=SMALL)
    np.testing.assert_allclose(flow.times[-1], expected, rtol=1e-4)


def test_a_flow_keeps_the_numbers_of_its_activation():
    flows = jax.vmap(lambda slope: sj.gradient_flow(pair(slope), ONE, HALF, save=SMALL))(SLOPES)
    np.testing.assert_array_equal(flows.net.activation.slope, SLOPES)
    lane = jax.tree.map(lambda a: a[2], flows)
    assert float(lane.net.activation(jnp.asarray(2.0))) == 5.0
    np.testing.assert_allclose(lane.net(jnp.ones(1)), 1 - 0.5**0.5, rtol=1e-3)


def test_derivatives_of_the_loss_by_the_numbers_of_an_activation():
    task = sj.Task(jax.random.normal(KEY, (20, 3)), jax.random.normal(KEY, (20, 2)))
    weights = sj.MLP([3, 5, 2], key=KEY).weights

    def loss(slope):
        return task_loss(sj.MLP.from_weights(weights, eqx.nn.PReLU(slope)), task)

    step = 1e-5
    central = (loss(0.3 + step) - loss(0.3 - step)) / (2 * step)
    assert float(jax.grad(loss)(0.3)) == pytest.approx(float(central), rel=1e-6)
    assert float(jax.jit(jax.grad(loss))(0.3)) == pytest.approx(float(central), rel=1e-6)


def test_other_numbers_in_an_activation_compile_nothing_anew():
    traced = []

    class Counted(Linear):
        def __call__(self, z):
            traced.append(z)
            return self.slope * z

    nets = [sj.MLP.from_weights([[[0.1]], [[0.1]]], Counted(jnp.asarray(slope))) for slope in (1.0, 2.0)]
    assert jax.tree.structure(nets[0]) == jax.tree.structure(nets[1])
    output = eqx.filter_jit(lambda net: net(jnp.ones(1)))
    before = len(traced)
    np.testing.assert_allclose([output(net)[0] for net in nets], [0.01, 0.02])
    assert len(traced) == before + 1


def test_an_activation_is_kept_as_it_was_given():
    assert sj.MLP([2, 3, 1], "tanh", key=KEY).activation is sj.ACTIVATIONS["tanh"]
    net = sj.MLP([2, 3, 1], jax.nn.hard_swish, key=KEY)
    assert net.activation is jax.nn.hard_swish
    assert len(jax.tree.leaves(net)) == 2
    moved = sj.scale_layers(pair(jnp.asarray(0.25)), 2.0).with_weights([jnp.ones((3, 1)), jnp.ones((1, 3))])
    assert float(moved.activation.slope) == 0.25
    assert float(sj.manifold.reduce(moved).activation.slope) == 0.25
    other = eqx.tree_at(lambda net: net.activation.slope, moved, jnp.asarray(4.0))
    np.testing.assert_allclose(other(jnp.ones(1)), [12.0])


def test_numbers_of_an_activation_everywhere_else():
    slope, task = jnp.asarray(2.0), sj.Task(jnp.eye(2), jnp.array([[3.0, 0.0], [0.0, 1.0]]))
    # s* = α ‖M‖ with M = E[y xᵀ].
    best = sj.escape_direction(task, [2, 3, 2], Linear(slope), key=KEY)
    assert float(best.speed) == pytest.approx(3.0)
    assert float(best.net.activation.slope) == 2.0
    assert sj.classify_activation(Linear(slope)).gain == 2.0
    net = pair(slope, 1e-3)
    trained = sj.gradient_descent(net, ONE, optax.sgd(0.1), 10)
    assert float(trained.net.activation.slope) == 2.0
    # The escape predicted is at v = 1/3, close to v = 1 − 1/√2, where half of the loss is left.
    assert float(sj.predict_escape(net, ONE).time) == pytest.approx(half_time(2.0, 1e-3)[0], rel=0.1)


def test_an_activation_takes_part_in_the_precision():
    net = sj.MLP.from_weights(np.full((2, 1, 1), 0.1, np.float32), Linear(jnp.asarray(1.0)))
    task = sj.Task(np.ones((1, 1), np.float32), np.ones((1, 1), np.float32))
    flow = sj.gradient_flow(net, task, HALF, save=SMALL)
    assert flow.losses.dtype == flow.net.activation.slope.dtype == jnp.float32
    assert float(flow.escape_time) == pytest.approx(half_time(1.0, 0.1)[0], rel=1e-3)


def test_what_depends_on_traced_numbers_is_refused_in_words():
    with pytest.raises(ValueError, match=r"activation must have values that are known here, .* holds traced arrays"):
        jax.vmap(lambda slope: sj.classify_activation(Linear(slope)).gain * slope)(SLOPES)
    with pytest.raises(ValueError, match=r"activation must have values that are known here, .* Equinox module"):
        jax.vmap(lambda slope: slope * slope_jumps(lambda z: slope * z))(SLOPES)
    with pytest.raises(ValueError, match="activation must have values that are known here"):
        jax.vmap(lambda slope: sj.escape_direction(ONE, [1, 2, 1], Linear(slope), key=KEY).speed)(SLOPES)
    # A network of such a function can still be evaluated.
    outputs = jax.vmap(lambda slope: sj.MLP.from_weights([[[1.0]], [[1.0]]], lambda z: slope * z)(jnp.ones(1)))(SLOPES)
    np.testing.assert_allclose(outputs[:, 0], SLOPES)


NOT_ENTRY_BY_ENTRY = {
    "softmax": jax.nn.softmax,
    "softmax over samples": lambda z: jax.nn.softmax(z, axis=0),
    "normalised": lambda z: z / jnp.max(jnp.abs(z)),
    "another one for every unit": lambda z: z * jnp.arange(z.shape[-1]),
    "a slope for every unit": eqx.nn.PReLU(jnp.ones(3)),
    "gated": jax.nn.glu,
    "not real": lambda z: 1j * z,
    "in NumPy": np.tanh,
    "without derivative": lambda z: jax.pure_callback(np.tanh, jax.ShapeDtypeStruct(z.shape, z.dtype), z),
}


@pytest.mark.parametrize("name", NOT_ENTRY_BY_ENTRY)
def test_activations_that_do_not_act_entry_by_entry_are_refused(name):
    function = NOT_ENTRY_BY_ENTRY[name]
    with pytest.raises(ValueError, match="activation must be an elementwise"):
        sj.MLP([2, 3, 1], function, key=KEY)
    with pytest.raises(ValueError, match="activation must be an elementwise"):
        jax.jit(lambda key: sj.MLP([2, 3, 1], function, key=key)(jnp.ones(2)))(KEY)


class Residual(sj.MLP):
    """Adds its input."""

    def __call__(self, x):
        return x + super().__call__(x)


class Biased(AbstractNetwork):
    """Holds biases, which no matrix contains."""

    weights: tuple
    biases: tuple
    activation: object = eqx.field(static=True)

    def matrices(self):
        return self.weights


class Tied(AbstractNetwork):
    """One weight for all layers between the first and the last."""

    weights: tuple
    activation: object = eqx.field(static=True)

    def matrices(self):
        first, shared, last = self.weights
        return (first, shared, shared, shared, last)


class Soft(Biased):
    """An activation that no constructor has looked at."""


TASK = sj.Task(jnp.eye(2), jnp.ones((2, 2)))
WEIGHTS = sj.MLP([2, 2, 2, 2], key=KEY).weights
OTHERS = {
    "overrides __call__": Residual.from_weights(WEIGHTS),
    "holds 2 floating-point arrays .* such as biases": Biased(WEIGHTS, (jnp.zeros(2), jnp.zeros(2)), jnp.tanh),
    "layers share weights": Tied(WEIGHTS, jnp.tanh),
    "elementwise": Soft(WEIGHTS, (), jax.nn.softmax),
}
TAKE_A_PERCEPTRON = {
    "bottleneck_layers": sj.bottleneck_layers,
    "imbalance": sj.imbalance,
    "imbalance_rate": lambda net: sj.imbalance_rate(net, TASK),
    "imbalance_matrices": sj.imbalance_matrices,
    "instantaneous_speed": lambda net: sj.saddle.instantaneous_speed(net, TASK),
    "leading_order_loss": lambda net: sj.saddle.leading_order_loss(net, TASK),
    "layer_cosines": lambda net: sj.saddle.layer_cosines(net, WEIGHTS),
    "reduce": sj.manifold.reduce,
    "expand": lambda net: sj.manifold.expand(net, 4),
    "project": sj.manifold.project,
    "distance": sj.manifold.distance,
    "growth_rates": lambda net: sj.manifold.growth_rates(net, TASK, lambda w: w),
    "transverse_growth": lambda net: sj.manifold.transverse_growth(net, TASK),
    "transverse_amplification": lambda net: sj.manifold.transverse_amplification(net, TASK, key=KEY),
    "off_block_growth": lambda net: sj.manifold.off_block_growth(net, TASK),
    "low_rank_margin": sj.low_rank_margin,
    "stable_rank": sj.saddle.stable_rank,
}


@pytest.mark.parametrize("name", TAKE_A_PERCEPTRON)
def test_networks_that_are_not_what_their_matrices_say_are_refused(name):
    for words, net in OTHERS.items():
        with pytest.raises(ValueError, match=words):
            TAKE_A_PERCEPTRON[name](net)


REMEDY = r"another Equinox module, .*MLP.*saddlejax\.MLP\.from_weights\(\[layer\.weight.*energy_error .*saddle_order"


@pytest.mark.parametrize("name", TAKE_A_PERCEPTRON)
def test_what_is_no_perceptron_is_refused_with_what_to_do(name):
    call = TAKE_A_PERCEPTRON[name]
    matrices_do = name in ("low_rank_margin", "stable_rank")
    with pytest.raises(ValueError, match=r"of type MLP.*\[layer\.weight for" if matrices_do else REMEDY):
        call(eqx.nn.MLP(2, 2, 2, 1, key=KEY))
    for other in (None, "net", 3.0):
        with pytest.raises(ValueError, match=r"^(net|small|weights_or_net) must be "):
            call(other)


def test_any_network_is_a_model_whose_groups_are_what_it_holds():
    """Of a perceptron its layers; of one that is more than that, all its arrays, and its output is that of `__call__`."""
    perceptron, residual = sj.MLP.from_weights(WEIGHTS, Linear(jnp.asarray(2.0))), OTHERS["overrides __call__"]
    assert as_problem(perceptron, TASK).parameters.names == ("weights[0]", "weights[1]", "weights[2]")
    everything = as_problem(perceptron, TASK, trainable=eqx.is_inexact_array).parameters
    assert len(everything.arrays) == 4 and everything.arrays[-1] == 2.0
    for net, groups in (
        (residual, 3),
        (Biased(WEIGHTS, (jnp.zeros(2), jnp.ones(2)), jnp.tanh), 5),
        (Tied(WEIGHTS, jnp.tanh), 3),
    ):
        problem = as_problem(net, TASK)
        loop = jnp.mean(jnp.stack([sj.mse(net(x), y) for x, y in zip(TASK.x, TASK.y, strict=True)]))
        assert len(problem.parameters.arrays) == groups
        np.testing.assert_allclose(problem.loss(problem.parameters.arrays), loop, rtol=1e-10)


def test_the_remedy_for_another_perceptron_works():
    mlp = eqx.nn.MLP(2, 2, 3, 2, jnp.tanh, use_bias=False, use_final_bias=False, key=KEY)
    net = sj.MLP.from_weights([layer.weight for layer in mlp.layers], jnp.tanh)
    np.testing.assert_allclose(net(jnp.arange(2.0)), mlp(jnp.arange(2.0)), rtol=1e-6)


def test_networks_that_come_in_a_batch_are_refused():
    nets = jax.vmap(lambda scale: sj.scale_layers(sj.MLP([2, 2, 2], key=KEY), scale))(SLOPES)
    with pytest.raises(ValueError, match=r"model\.weights\[0\] must be a matrix"):
        sj.gradient_flow(nets, TASK)


def test_other_whole_numbers_and_layers_are_checked():
    net = sj.MLP([2, 2, 2], key=KEY)
    for bad in (True, 0, 2.5):
        with pytest.raises(ValueError, match="krylov_size must be a whole number"):
            sj.ExponentialRosenbrock(krylov_size=bad)
    with pytest.raises(ValueError, match="stages must be 2 or 3"):
        sj.ExponentialRosenbrock(stages=4)
    with pytest.raises(ValueError, match="bottleneck must name each layer once"):
        sj.sweep(TASK, width=2, depth=2, bottleneck=(0, 0), scale=0.1)
    for call in (sj.predict_escape, sj.critical_exponent):
        with pytest.raises(ValueError, match="layers must name at least one layer"):
            call(net, TASK, layers=())
        with pytest.raises(ValueError, match="layers must hold indices"):
            call(net, TASK, layers=True)
