"""The block-symmetric submanifold: exact reductions, the chain, and perturbations across it."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from problems import HALF, SMALL

import saddlejax as sj
from saddlejax import manifold
from saddlejax.objective import task_loss

KEY = jax.random.key(5)
PARTITION = [2, [0, 1, 2, 0, 1, 2, 0, 2]]


def data(loss=sj.mse, outputs=2):
    rng = np.random.default_rng(3)
    x = rng.normal(size=(20, 3))
    return sj.Task(x, rng.integers(0, 2, 20) if loss is sj.cross_entropy else np.sin(x[:, :outputs]), loss)


def random_network(activation="tanh"):
    return sj.MLP([3, 6, 8, 2], activation, key=KEY)


# Exact reductions


@pytest.mark.parametrize("blocks", [1, 3, PARTITION])
def test_reduced_network_has_the_same_outputs_loss_and_gradient(blocks):
    task = data(sj.cross_entropy)
    wide = manifold.project(random_network("gelu"), blocks)
    small = manifold.reduce(wide, blocks)
    np.testing.assert_allclose(jax.vmap(wide)(task.x), jax.vmap(small)(task.x), atol=1e-10)
    np.testing.assert_allclose(
        [jnp.linalg.norm(w) for w in wide.weights], [jnp.linalg.norm(a) for a in small.weights], rtol=1e-10
    )
    slope = jax.grad(lambda weights: task_loss(wide.with_weights(weights), task))(wide.weights)
    small_slope = jax.grad(lambda weights: task_loss(small.with_weights(weights), task))(small.weights)
    # The wide gradient lies in the submanifold, and its coordinates are the narrow gradient.
    assert float(manifold.distance(wide.with_weights(slope), blocks)) < 1e-10
    coordinates = manifold.reduce(wide.with_weights(slope), blocks)
    chex.assert_trees_all_close(coordinates.weights, small_slope, atol=1e-10)
    chex.assert_trees_all_close(manifold.expand(small).weights, wide.weights, atol=1e-10)


@pytest.mark.parametrize(
    ("activation", "loss", "blocks"),
    [
        ("tanh", sj.mse, 1),
        ("gelu", sj.cross_entropy, PARTITION),
        ("sin", sj.mse, [3, 2]),
    ],
)
def test_wide_and_reduced_flows_agree(activation, loss, blocks):
    task = data(loss)
    wide = sj.scale_layers(manifold.project(random_network(activation), blocks), 0.1)
    small = manifold.reduce(wide, blocks)
    flows = [sj.gradient_flow(net, task, rtol=1e-8) for net in (wide, small)]
    assert all(flow.status == sj.Status.escaped for flow in flows)
    assert float(flows[0].log_escape_time) == pytest.approx(float(flows[1].log_escape_time), abs=1e-6)
    # The error norms are isometric too, so that both take the same steps.
    np.testing.assert_allclose(flows[0].times, flows[1].times, rtol=1e-6)
    np.testing.assert_allclose(flows[0].layer_norms, flows[1].layer_norms, rtol=1e-6)
    assert float(manifold.distance(flows[0].net, blocks)) < 1e-8


def test_expansion_to_other_widths_keeps_the_layer_norms():
    small = manifold.reduce(manifold.project(random_network(), 2), 2)
    wide = manifold.expand(small, 10)
    assert wide.sizes == (3, 10, 10, 2)
    again = manifold.reduce(wide, 2)
    chex.assert_trees_all_close(again.weights, small.weights, atol=1e-10)
    # From an ordinary narrow network, with neurons duplicated in unequal numbers.
    narrow = sj.MLP([3, 2, 2], "tanh", key=KEY)
    assert manifold.reduce(manifold.expand(narrow, [5]), [[0, 0, 0, 1, 1]]).sizes == (3, 2, 2)


def test_projection_is_the_nearest_symmetric_network():
    net = random_network()
    near = manifold.project(net, PARTITION)
    assert float(manifold.distance(near, PARTITION)) < 1e-10
    # The same program with the same inputs, so equal to the last bit.
    labels = np.array([[0, 1] * 4] * 2)
    same = sj.MLP([3, 8, 8, 2], key=KEY)
    assert float(manifold.distance(same, labels)) == float(manifold.distance(same, labels.tolist()))
    length = np.sqrt(sum(float(jnp.sum((a - b) ** 2)) for a, b in zip(net.weights, near.weights, strict=True)))
    assert float(manifold.distance(net, PARTITION)) == pytest.approx(length, rel=1e-10)
    # Orthogonal: any other symmetric network is further away.
    other = near.with_weights(manifold.project(sj.MLP(net.sizes, key=jax.random.key(9)), PARTITION).weights)
    product = sum(float(jnp.sum((a - b) * c)) for a, b, c in zip(net.weights, near.weights, other.weights, strict=True))
    assert abs(product) < 1e-10
    batch = jax.vmap(lambda s: manifold.distance(net.with_weights([s * w for w in net.weights]), 2))(jnp.ones(2))
    assert float(batch[1]) == pytest.approx(float(manifold.distance(net, 2)), rel=1e-10)


def test_networks_off_the_manifold_and_bad_partitions_are_refused():
    net = random_network()
    distance = float(manifold.distance(net))
    for call, words in (
        (lambda: manifold.reduce(net), f"at distance {distance:.3g} from such networks"),
        (lambda: manifold.reduce(net, 7), r"blocks\[0\] must be between 1 and the 6 neurons"),
        (lambda: manifold.reduce(net, [2]), "one entry for each of the 2 hidden layers"),
        (lambda: manifold.reduce(net, [2, [0, 1]]), r"blocks\[1\] must be a number of blocks or 8 labels"),
        (lambda: manifold.reduce(net, [[0, 2] * 3, 1]), r"blocks\[0\] must use every label"),
        (lambda: manifold.expand(net), "widths must be given"),
        (lambda: manifold.expand(net, 5), r"widths\[0\] must be a whole number of at least 6"),
        (lambda: manifold.chain([0.1], jnp.sin, "tanh", 5), "scales must hold at least two layer norms"),
        (lambda: manifold.chain([0.1] * 2, 3.0, "tanh", 5), "task_or_teacher must be a Task, or a function"),
    ):
        with pytest.raises(ValueError, match=words):
            call()


# The chain


def test_chain_follows_the_full_network_along_the_whole_curve():
    # Four layers of norms 0.03 … 0.09: seven identical neurons a layer, trained on the same inputs.
    norms = [0.03, 0.05, 0.07, 0.09]
    net, task = manifold.chain(norms, jnp.sin, "gelu", 7)
    full = manifold.expand(net)
    assert full.sizes == (1, 7, 7, 7, 1)
    end = float(sj.gradient_flow(net, task, HALF, save=SMALL).escape_time)
    save = sj.Save(times=jnp.linspace(0.02, 1.05, 30) * end)
    flows = [sj.gradient_flow(one, task, sj.Time(1.1 * end), rtol=1e-9, save=save) for one in (net, full)]
    assert float(flows[0].losses[0] / flows[0].losses[-1]) > 2
    np.testing.assert_allclose(flows[0].losses, flows[1].losses, rtol=1e-6)
    np.testing.assert_allclose(flows[0].layer_norms, flows[1].layer_norms, rtol=1e-6)
    np.testing.assert_allclose(flows[0].imbalance[0], np.diff(np.square(norms)), rtol=1e-3)
    assert float(flows[0].imbalance_error) < 1e-6


@pytest.mark.parametrize(
    ("activation", "depth", "expected"),
    [
        ("tanh", 3, [0.8775, 0.9878, 0.9988, 0.9999]),
        ("tanh", 4, [0.9892, 0.9999, 1.0000, 1.0000]),
        ("gelu", 3, [0.9170, 0.9917, 0.9992, 0.9999]),
        ("gelu", 5, [0.9991, 1.0000, 1.0000, 1.0000]),
        ("erf", 4, [0.9867, 0.9999, 1.0000, 1.0000]),
        ("silu", 6, [0.9999, 1.0000, 1.0000, 1.0000]),
    ],
)
def test_escape_times_approach_the_law_with_its_prefactor(activation, depth, expected):
    # τ K (L−2) ε^{L−2} → 1 with K = α^{L−1}; the values on the way were computed independently, to four digits.
    gain = sj.classify_activation(activation).gain
    for scale, ratio in zip([1e-1, 1e-2, 1e-3, 1e-4], expected, strict=True):
        net, task = manifold.chain([scale] * depth, lambda g: g, activation, 50)
        flow = sj.gradient_flow(net, task, HALF, rtol=1e-7, save=SMALL)
        law = sj.law.log_escape_time(scale, depth, gain ** (depth - 1), end=1e6)
        assert np.exp(float(flow.log_escape_time - law)) == pytest.approx(ratio, abs=6e-5)


def test_balanced_equation_is_the_chain_where_the_balance_is_conserved():
    # A linear chain of equal norms stays balanced, and reaches y when the scalar equation does.
    net, task = manifold.chain([1e-2] * 4, lambda g: g, "identity", 9)
    ends = np.array([1e-2, 3e-2, 0.4, 0.8])
    log_times = manifold.balanced_log_times(ends, lambda g: g, "identity", 9, 4)
    save = sj.Save(times=jnp.exp(log_times[1:]))
    flow = sj.gradient_flow(net, task, sj.Time(1.01 * save.times[-1]), rtol=1e-9, save=save)
    np.testing.assert_allclose(flow.layer_norms[:, 2], ends[1:], rtol=1e-5)
    # For tanh the balance is approximate, the better the smaller the weights.
    flow = sj.gradient_flow(*manifold.chain([1e-2] * 4, lambda g: g, "tanh", 9), HALF, rtol=1e-7, save=SMALL)
    end = float(flow.layer_norms[-1].mean())
    balanced = manifold.balanced_log_times([1e-2, end], lambda g: g, "tanh", 9, 4)[-1]
    assert float(balanced) == pytest.approx(float(flow.log_escape_time), abs=1e-3)


def test_norms_below_the_precision_are_refused():
    # Down to the norms that are refused the scalar equation of a linear chain has the time of the law.
    times = manifold.balanced_log_times([1e-40, 1e-20], lambda g: g, "identity", 9, 8)
    law = sj.law.log_escape_time(1e-40, 8, end=1e-20)
    assert float(times[-1]) == pytest.approx(float(law), rel=1e-8)
    with pytest.raises(ValueError, match=r"norms must be above 4.2e-44, .* underflows in float64"):
        manifold.balanced_log_times([1e-60, 1e-20], lambda g: g, "identity", 9, 8)
    with jax.enable_x64(False), pytest.raises(ValueError, match="scales must be large enough for float32"):
        manifold.chain([1e-50] * 3, lambda g: g, "identity", 9)


def test_chain_on_data_is_the_one_block_network():
    task = data()
    net, same = manifold.chain([0.1] * 3, task, "tanh", 6)
    assert same is task
    wide = manifold.expand(net)
    assert wide.sizes == (3, 6, 6, 2)
    np.testing.assert_allclose(jax.vmap(wide)(task.x), jax.vmap(net)(task.x), atol=1e-10)
    # It starts along the direction of largest signal energy.
    matrix = sj.saddle.origin_matrix(task)
    top = float(jnp.linalg.svd(matrix, compute_uv=False)[0])
    assert float(sj.saddle.instantaneous_speed(wide, task)) == pytest.approx(top, rel=1e-10)


# Across the manifold


def symmetric_point():
    return sj.scale_layers(manifold.project(random_network(), 1), 0.1), data()


def test_transverse_growth_is_that_of_the_dense_hessian():
    net, task = symmetric_point()
    flat, unravel = ravel_pytree(net.weights)
    hessian = jax.hessian(lambda w: task_loss(net.with_weights(unravel(w)), task))(flat)
    along = jax.vmap(lambda v: ravel_pytree(manifold.project(net.with_weights(unravel(v)), 1).weights)[0])(
        jnp.eye(flat.size)
    )
    across = jnp.eye(flat.size) - along
    # The Hessian does not couple the two.
    assert float(jnp.max(jnp.abs(across @ hessian @ along))) < 1e-10 * float(jnp.max(jnp.abs(hessian)))
    dense = -jnp.linalg.eigvalsh(across @ hessian @ across)[0]
    assert float(manifold.transverse_growth(net, task)[0]) == pytest.approx(float(dense), rel=1e-8)
    single = net.with_weights([w.astype(jnp.float32) for w in net.weights])
    rate = manifold.transverse_growth(single, task.astype(jnp.float32))
    assert rate.dtype == jnp.float32
    assert float(rate[0]) == pytest.approx(float(dense), rel=1e-4)


def test_perturbation_along_the_flow_grows_as_two_flows_part():
    net, task = symmetric_point()
    amplification, flow = manifold.transverse_amplification(net, task, key=KEY)
    assert flow.status == sj.Status.escaped
    known = np.isfinite(np.asarray(flow.losses))
    amplification = np.asarray(amplification)[known]
    assert amplification[0] == pytest.approx(1, rel=1e-10)
    # Plain gradient descent from a slightly perturbed network moves away from the submanifold by the same factor.
    shapes = [w.shape for w in net.weights]
    noise = net.with_weights([jax.random.normal(k, s) for k, s in zip(jax.random.split(KEY, 3), shapes, strict=True)])
    size = 1e-6
    across = [size * (n - p) for n, p in zip(noise.weights, manifold.project(noise).weights, strict=True)]
    start = net.with_weights([w + a for w, a in zip(net.weights, across, strict=True)])
    time, rate = float(flow.times[known][-2]), 1e-2

    def step(weights, _):
        slopes = jax.grad(lambda w: task_loss(net.with_weights(w), task))(weights)
        return tuple(w - rate * s for w, s in zip(weights, slopes, strict=True)), None

    end, _ = jax.lax.scan(step, tuple(start.weights), length=round(time / rate))
    ratio = float(manifold.distance(net.with_weights(end)) / manifold.distance(start))
    assert ratio == pytest.approx(amplification[-2], rel=2e-2)


def test_off_block_growth_at_the_saddles_of_a_linear_network():
    strengths, depth = np.array([4.0, 2.0, 1.0]), 4
    task = sj.tasks.linear_teacher(strengths, in_size=3)

    def saddle(learned):
        return sj.MLP.from_weights([np.diag(np.where(learned, strengths, 0) ** (1 / depth))] * depth, "identity")

    # Largest eigenvalue S_p^{(L−2)/L} (S_j − S_p) over learned p and unlearned j, and 0 among the unlearned.
    for learned in ([True, False, False], [True, True, False], [False, True, False], [False, False, True]):
        mask = np.array(learned)
        pairs = [
            strengths[p] ** (1 - 2 / depth) * (strengths[j] - strengths[p])
            for p in np.flatnonzero(mask)
            for j in np.flatnonzero(~mask)
        ]
        expected = max([*pairs, 0.0])
        rate = manifold.off_block_growth(saddle(mask), task)
        assert float(rate[0]) == pytest.approx(expected, abs=1e-8)
    # Not only the largest: the decay of the learned block as a carrier of the other modes is there too.
    rates = manifold.off_block_growth(saddle(np.array([True, False, False])), task, 3)
    np.testing.assert_allclose(rates[1:], [2 * (2 - 4), 2 * (1 - 4)], rtol=1e-8)


def test_off_block_couplings_grow_on_the_second_plateau_of_a_tanh_network():
    nodes, weights = np.polynomial.hermite_e.hermegauss(12)
    x = np.stack(np.meshgrid(nodes, nodes, indexing="ij"), axis=-1).reshape(-1, 2)
    task = sj.Task(x, x * np.array([2.0, 1.0]), sample_weights=np.outer(weights, weights).ravel() / weights.sum() ** 2)
    aligned = sj.MLP.from_weights([0.01 * np.eye(2)] * 3, "tanh")
    net = manifold.reduce(manifold.expand(aligned, 20), 2)
    # The first mode takes 2 of the loss 2.5; what is left of it and the second mode keep the flow above 0.51.
    flow = sj.gradient_flow(net, task, sj.Loss(0.52), save=SMALL)
    assert flow.status == sj.Status.loss_reached
    couplings = [np.asarray(w - np.diag(np.diag(w))) for w in flow.net.weights]
    assert max(np.max(np.abs(c)) for c in couplings) < 1e-8
    rate = manifold.off_block_growth(flow.net, task)[0]
    dense = ravel_pytree(flow.net.weights)
    hessian = jax.hessian(lambda w: task_loss(flow.net.with_weights(dense[1](w)), task))(dense[0])
    off = np.flatnonzero(ravel_pytree(tuple(1 - np.eye(2) for _ in range(3)))[0])
    assert float(rate) == pytest.approx(float(-np.linalg.eigvalsh(hessian[np.ix_(off, off)])[0]), rel=1e-6)
    assert float(rate) > 0.005
