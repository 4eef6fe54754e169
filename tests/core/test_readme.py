"""The README's Python, run as it is written, block after block."""

import re
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

README = Path(__file__).resolve().parents[2] / "README.md"


def test_code_blocks_run_as_written(capsys):
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(blocks) >= 3
    names = {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for number, block in enumerate(blocks):
            exec(compile(block, f"README block {number}", "exec"), names)  # our own file
    printed = capsys.readouterr().out
    assert "7 weights, 4,880 trainable parameters" in printed
    assert printed.count("on activations") == 7 and "materialized" not in printed
    ha, scales = names["ha"], names["scales"]
    forward, params, batch = names["forward"], names["params"], names["batch"]
    np.testing.assert_allclose(
        forward(params, scales, batch),
        names["fn"](ha.merge(params, scales), batch),
        rtol=1e-3,
        atol=1e-4,
    )
    for got, want in zip(jax.tree.leaves(names["again"]), jax.tree.leaves(scales), strict=True):
        assert jnp.array_equal(got, want)
    assert names["outputs"].shape == (3, *batch.shape)
    assert jax.tree.structure(names["updates"]) == jax.tree.structure(names["trainable"])
