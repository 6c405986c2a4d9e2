# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation: {extension: .py, format_name: percent}
#   kernelspec: {display_name: Python 3, language: python, name: python3}
# ---

# %% [markdown]
# # Your own network and data
#
# How long will *your* network stay on its plateau? Predict it, choose the scale of the weights, and check with the optimiser that you
# use. Any Equinox module will do; here it is a small convolutional network with biases. Replace the next cells by your own arrays and your own model.

# %%
import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import optax
from sklearn.datasets import load_digits

import saddlejax as sj

jax.config.update("jax_enable_x64", True)

# %% [markdown]
# ## Data
# `x` of shape `(samples, ...)`, as your model takes a sample, and labels or targets. Centre and scale the inputs: times are measured in units
# that they set.

# %%
data = load_digits()
images = data.images[:300, None]  # one channel
images = (images - images.mean()) / images.std()
task = sj.Task(images, data.target[:300], loss=sj.cross_entropy)
print(task)

# %% [markdown]
# ## Your model
# It maps one sample to an output; batches are saddlejax's business. All of its floating-point arrays move, and each of them is one group of
# the flow: three kernels and three biases.


# %%
class Convolutional(eqx.Module):
    first: eqx.nn.Conv2d
    second: eqx.nn.Conv2d
    last: eqx.nn.Linear

    def __init__(self, key):
        keys = jax.random.split(key, 3)
        self.first = eqx.nn.Conv2d(1, 4, kernel_size=3, stride=2, key=keys[0])
        self.second = eqx.nn.Conv2d(4, 8, kernel_size=2, key=keys[1])
        self.last = eqx.nn.Linear(32, 10, key=keys[2])

    def __call__(self, image):
        hidden = jnp.tanh(self.second(jnp.tanh(self.first(image))))
        return self.last(jnp.ravel(hidden))


model = Convolutional(jax.random.key(0))
small = sj.scale_layers(model, 0.01)

# %% [markdown]
# ## Which law holds
# The order `r` of the saddle at zero weights, as the data see it: the plateau lasts a time of order `ε^{−(r−2)}`. Three kernels are multiplied with
# each other, so that `r = 3`. The bias of the last layer finds its minimum, the frequencies of the classes, within a time of order one.

# %%
order = sj.saddle_order(small, task)
print(order)
assert order.order == 3

# %% [markdown]
# ## The plateau, predicted
# All parameters at 0.01 of the usual initialisation, trained by gradient descent at learning rate 0.1.

# %%
rate = 0.1
print(sj.predict_escape(small, task, learning_rate=rate))

# %% [markdown]
# ## Choose the scale
# We can afford a plateau of 1000 steps. How much larger must the weights be?

# %%
factor = sj.scale_for_steps(small, task, steps=1000, learning_rate=rate)
chosen = sj.scale_layers(small, factor)
print(f"scale {0.01 * factor:.4f}")

# %% [markdown]
# ## Check
# Gradient flow without the assumptions of the prediction, and plain gradient descent. Both return the same record. The energy error says
# that the loss lost is `∫ ‖∇𝓛‖² dt`, as it is along the exact flow of any model.

# %%
flow = sj.gradient_flow(chosen, task)
print(flow)

# %%
descent = sj.gradient_descent(chosen, task, optax.sgd(rate), steps=2000)
step = int(descent.stats["escape_step"])
print(f"predicted 1000 steps, gradient flow {float(flow.escape_time) / rate:.0f}, gradient descent {step}")
assert abs(step * rate / flow.escape_time - 1) < 0.05

# %% [markdown]
# ## Other optimisers
# Momentum 0.9 moves nearly ten times as fast along the plateau, once it has gathered. Adam rescales the gradient and hardly waits: its steps cover the more
# flow time the smaller the gradient is, most of the plateau in the first few. When does each come to the loss at the escape of the flow?

# %%
momentum = sj.gradient_descent(chosen, task, optax.sgd(rate, momentum=0.9), steps=1000)
adam = sj.gradient_descent(chosen, task, optax.adam(1e-3), steps=1000)
runs = (("gradient descent", descent), ("momentum 0.9", momentum), ("Adam", adam))
for name, run in runs:
    print(f"{name}: {int(run.steps[jnp.argmax(run.losses < flow.losses[-1])])} steps")

# %%
ax = sj.plot.quiet()
for number, (name, run) in enumerate(runs):
    ax.plot(
        run.steps[1:], run.losses[1:], color=sj.plot.COLOURS[number], linestyle=("-", "--", "-.")[number], label=name
    )
ax.axvline(1000, color="0.45", linewidth=1, linestyle=(0, (4, 3)))
ax.annotate(
    "predicted", (940, 0.7), xycoords=("data", "axes fraction"), ha="right", va="top", rotation=90, color="0.35"
)
ax.set(xscale="log", xlabel="step", ylabel=r"loss $\mathcal{L}$")
ax.legend(frameon=False, loc="lower left")
plt.show()
