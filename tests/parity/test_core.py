"""The adapted function and the vectors' gradients against torch's, for ``diag(a) W diag(b)``.

Torch holds the paper's layout (outputs x inputs) and scales the weight itself; here the kernels are
(inputs, outputs) and the activations are scaled.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import hyperadapt_jax as ha

torch = pytest.importorskip("torch")
functional = torch.nn.functional
RNG = np.random.default_rng(0)


def normal(*shape):
    return RNG.normal(size=shape).astype(np.float32)


def compare(fn, params, roles, x, reference, to_torch):
    """Outputs, and gradients of a loss, of adapt(fn) and of a torch function of scaled weights."""
    plan = ha.plan(params, *((path, axes) for path, axes in roles.items()))
    scales = jax.tree.map(lambda d: jnp.asarray(0.3 * normal(*d.shape)), ha.init(plan))

    def loss(scales):
        y = ha.adapt(fn, materialize="error")(params, scales, x)
        return jnp.mean(jnp.sin(y)), y

    (_, y), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(scales)

    vectors = {
        path: [torch.tensor(np.asarray(1 + v), requires_grad=True) for v in (s.row, s.col)]
        for path, s in scales.items()
    }
    weights = {path: to_torch(torch.tensor(params[path])) for path in vectors}
    others = {path: torch.tensor(value) for path, value in params.items() if path not in vectors}
    scaled = {}
    for path, (row, col) in vectors.items():
        spatial = [1] * (weights[path].ndim - 2)
        scaled[path] = row.view(-1, 1, *spatial) * weights[path] * col.view(1, -1, *spatial)
    want = reference({**scaled, **others}, torch.tensor(x))
    torch.sin(want).mean().backward()

    np.testing.assert_allclose(y, want.detach().numpy(), rtol=1e-4, atol=1e-5)
    for path, (row, col) in vectors.items():
        np.testing.assert_allclose(grads[path].row, row.grad.numpy(), rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(grads[path].col, col.grad.numpy(), rtol=1e-4, atol=1e-6)


def test_two_linear_layers_whose_biases_are_not_scaled():
    params = {"up": normal(7, 12), "down": normal(12, 5), "bias": normal(12)}
    compare(
        lambda p, x: jnp.tanh(x @ p["up"] + p["bias"]) @ p["down"],
        params,
        {"up": "in out", "down": "in out"},
        normal(4, 7),
        lambda w, x: functional.linear(
            torch.tanh(functional.linear(x, w["up"], w["bias"])), w["down"]
        ),
        lambda w: w.T,
    )


def test_convolution():
    def fn(params, x):
        numbers = ("NCHW", "HWIO", "NCHW")
        return lax.conv_general_dilated(x, params["w"], (2, 1), "VALID", dimension_numbers=numbers)

    compare(
        fn,
        {"w": normal(3, 2, 6, 4)},
        {"w": "- - in out"},
        normal(2, 6, 8, 7),
        lambda w, x: functional.conv2d(x, w["w"], stride=(2, 1)),
        lambda w: w.permute(3, 2, 0, 1),
    )


def test_attention_with_merged_heads():
    def split(y):
        return y.reshape(*y.shape[:2], 2, 4)

    def fn(p, x):
        q, k, v = (split(x @ p[name]) for name in "qkv")
        return jax.nn.dot_product_attention(q, k, v, is_causal=True).reshape(x.shape) @ p["o"]

    def reference(w, x):
        q, k, v = (split(functional.linear(x, w[name])).transpose(1, 2) for name in "qkv")
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return functional.linear(y.transpose(1, 2).reshape(x.shape), w["o"])

    params = {name: normal(8, 8) / 3 for name in "qkvo"}
    compare(fn, params, dict.fromkeys("qkvo", "in out"), normal(3, 5, 8), reference, lambda w: w.T)
