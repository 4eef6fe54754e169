"""Selection: what a plan matches, what it counts, and every mistake it catches."""

import math
import re

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import hyperadapt_jax as ha
from hyperadapt_jax import paths
from hyperadapt_jax.scales import ROLES
from tests.core.trees import AXES, TREES, layer, weights


def struct(*shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype)


def model():
    return {"attention": {"q": layer(), "v": layer()}, "mlp": {"up": layer(), "down": layer()}}


def chosen(plan):
    return [weight.path for weight in plan.weights]


def refused(*args, **kwargs):
    """The message of the PlanError that planning raises."""
    with pytest.raises(ha.PlanError) as error:
        ha.plan(*args, **kwargs)
    return str(error.value)


# What is matched


@pytest.mark.parametrize("name", TREES)
def test_every_container(name):
    make, weight, axes, bias = TREES[name]
    plan = ha.plan(make(), ha.Target(r"(params/)?(q|0)/(kernel|weight)", axes))
    assert chosen(plan) == [weight]
    assert (plan.weights[0].arrays, plan.count) == ({"row": (5,), "col": (3,)}, 8)
    both = ha.plan(make(), (weight, axes), (bias, "out"))
    assert sorted(chosen(both)) == sorted([weight, bias]) and both.count == 8 + 5


@pytest.mark.parametrize("name", TREES)
def test_shapes_and_dtypes_are_enough(name):
    make, weight, axes, _ = TREES[name]
    tree = make()
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype) if paths.is_array(x) else x, tree
    )
    assert str(ha.plan(shapes, (weight, axes))) == str(ha.plan(tree, (weight, axes)))


def test_patterns_match_whole_paths_and_lists_match_suffixes():
    tree = model()
    assert chosen(ha.plan(tree, (r".*/(q|up)/kernel", "in out"))) == [
        "attention/q/kernel",
        "mlp/up/kernel",
    ]
    # In the tree's order, whatever the order of the targets.
    assert chosen(ha.plan(tree, (["v/kernel", "attention/q/kernel"], "in out"))) == [
        "attention/q/kernel",
        "attention/v/kernel",
    ]
    assert chosen(ha.plan(tree, (".*/up/kernel", "in out"), (".*/q/kernel", "out in"))) == [
        "attention/q/kernel",
        "mlp/up/kernel",
    ]


def test_exclude():
    tree = model()
    kept = ["attention/q/kernel", "attention/v/kernel"]
    assert chosen(ha.plan(tree, (".*/kernel", "in out"), exclude="mlp/.*")) == kept
    mlp = ["up/kernel", "down/kernel"]
    assert chosen(ha.plan(tree, (["kernel"], "in out"), exclude=mlp)) == kept
    # What is excluded may match two targets, and need not fit any.
    tree["mlp"] = {"up": struct(3, dtype=jnp.int8)}
    plan = ha.plan(tree, (".*/kernel", "in out"), (["q/bias", "mlp/up"], "out"), exclude="mlp/up")
    assert chosen(plan) == ["attention/q/bias", *kept]


@pytest.mark.parametrize("name", AXES)
def test_vector_shapes(name):
    axes, shape = AXES[name]
    (weight,) = ha.plan(weights(), ([name], axes)).weights
    want = {
        "plain": ((5,), (3,)),
        "transposed": ((5,), (3,)),
        "one input": ((7,), (1,)),
        "one output": ((1,), (7,)),
        "row only": ((5,), None),
        "col only": (None, (3,)),
        "vector": ((5,), None),
        "stacked": ((2, 5), (2, 3)),
        "stacked last": ((5, 2), (3, 2)),
        "experts in layers": ((2, 3, 4), (2, 3, 1)),
        "heads out": ((2, 3), (4,)),
        "heads in": ((4,), (2, 3)),
        "convolution": ((5,), (3,)),
    }[name]
    assert (weight.arrays.get("row"), weight.arrays.get("col")) == want
    assert weight.shape == shape and weight.axes == axes


@given(st.lists(st.tuples(st.sampled_from(ROLES), st.integers(1, 4)), max_size=5))
def test_vectors_hold_the_axes_of_their_roles(axes):
    roles, shape = " ".join(role for role, _ in axes), tuple(size for _, size in axes)
    if not {"in", "out"} & set(roles.split()):
        with pytest.raises(ha.PlanError, match="nothing would be scaled"):
            ha.Target("w", roles)
        return
    plan = ha.plan({"w": struct(*shape)}, ("w", roles))
    size_of = {r: math.prod(size for role, size in axes if role == r) for r in ROLES}
    sides = {"in", "out"} & set(roles.split())
    assert plan.count == size_of["stack"] * sum(size_of[side] for side in sides)
    scales = ha.init(plan)
    assert ha.count(scales) == plan.count
    for delta in jax.tree.leaves(scales):
        assert delta.dtype == jnp.float32 and not delta.any()


def test_sides():
    tree = {"w": struct(4, 3, 5), "conv": struct(3, 3, 4, 2)}
    targets = ("w", "stack in out"), ("conv", "- - in out")
    both, row, col = (ha.plan(tree, *targets, sides=sides) for sides in ("both", "row", "col"))
    assert [weight.axes for weight in row.weights] == ["- - - out", "stack - out"]
    assert [weight.axes for weight in col.weights] == ["- - in -", "stack in -"]
    assert (row.count, col.count) == (2 + 20, 4 + 12) and both.count == row.count + col.count
    says = refused({"w": struct(3, 5)}, ("w", "- out"), sides="col")
    assert says == "w: the roles '- out' leave nothing to scale with sides='col'; exclude it"


# What is counted

SHAPES = {  # (input, output) features of each linear, and the number of layers
    "RoBERTa-base": (
        12,
        dict.fromkeys("qkvo", (768, 768)) | {"up": (768, 3072), "down": (3072, 768)},
    ),
    "RoBERTa-large": (
        24,
        dict.fromkeys("qkvo", (1024, 1024)) | {"up": (1024, 4096), "down": (4096, 1024)},
    ),
    "Phi-4": (
        40,
        {"qkv": (5120, 7680), "o": (5120, 5120), "gate_up": (5120, 35840), "down": (17920, 5120)},
    ),
}
for name, layers, width, kv, inner in (
    ("Llama-3-8B", 32, 4096, 1024, 14336),
    ("Llama-3.2-3B", 28, 3072, 1024, 8192),
    ("Qwen2.5-7B", 28, 3584, 512, 18944),
    ("Qwen2.5-0.5B", 24, 896, 128, 4864),
):
    SHAPES[name] = (
        layers,
        dict.fromkeys("qo", (width, width))
        | dict.fromkeys("kv", (width, kv))
        | {"gate": (width, inner), "up": (width, inner), "down": (inner, width)},
    )


@pytest.mark.parametrize(
    ("name", "linears", "count"),
    [
        ("RoBERTa-base", "q|v", 36_864),
        ("RoBERTa-base", ".*", 165_888),
        ("RoBERTa-large", "q|v", 98_304),
        ("RoBERTa-large", ".*", 442_368),
        ("Llama-3-8B", "q|v", 425_984),
        ("Llama-3-8B", "q|k|v|up|down", 1_769_472),
        ("Llama-3-8B", ".*", 2_621_440),
        ("Llama-3.2-3B", "q|v", 286_720),
        ("Llama-3.2-3B", "q|k|v|up|down", 1_032_192),
        ("Llama-3.2-3B", ".*", 1_519_616),
        ("Qwen2.5-7B", "q|v", 315_392),
        ("Qwen2.5-7B", "q|k|v|up|down", 1_691_648),
        ("Qwen2.5-7B", ".*", 2_523_136),
        ("Qwen2.5-0.5B", "q|k|v|up|down", 368_640),
        ("Qwen2.5-0.5B", ".*", 549_888),
        ("Phi-4", ".*", 3_481_600),
    ],
)
def test_counts_of_known_models(name, linears, count):
    layers, shapes = SHAPES[name]
    scanned = {linear: {"kernel": struct(layers, *shape)} for linear, shape in shapes.items()}
    unrolled = [{linear: {"kernel": struct(*shape)} for linear, shape in shapes.items()}] * layers
    assert ha.plan(scanned, (rf"({linears})/kernel", "stack in out")).count == count
    assert ha.plan(unrolled, (rf"\d+/({linears})/kernel", "in out")).count == count


def test_a_printed_plan():
    tree = {"layers": {"q": struct(32, 64, 256), "bias": struct(32, 256)}, "head": struct(64, 100)}
    plan = ha.plan(tree, ("layers/q", "stack in out"), ("head", "- out"))
    assert str(plan) == (
        "weight    shape      dtype     roles         row     col    parameters\n"
        "head      64x100     bfloat16  - out         100     -             100\n"
        "layers/q  32x64x256  bfloat16  stack in out  32x256  32x64      10,240\n"
        "2 weights, 10,340 trainable parameters, 1.919% of the model's 538,880;"
        " 41.4 kB in float32, 124.1 kB with Adam's state"
    )


def test_a_plan_shows_and_keeps_shardings():
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    sharding = NamedSharding(mesh, P(None, "data", "model"))
    tree = {"q": jax.ShapeDtypeStruct((3, 4, 8), jnp.bfloat16, sharding=sharding), "b": struct(8)}
    plan = ha.plan(tree, ("q", "stack in out"), ("b", "out"))
    (_, *lines, _) = str(plan).splitlines()
    assert [re.split(r"  +", line)[-2:] for line in lines] == [
        ["-", "-"],
        [str(P(None, "model")), str(P(None, "data"))],
    ]
    scales = ha.init(plan)
    assert scales["q"].row.sharding == NamedSharding(mesh, P(None, "model"))
    assert scales["q"].col.sharding == NamedSharding(mesh, P(None, "data"))


# What is refused


def test_no_target():
    assert "no targets; give at least one" in refused(model())


def test_a_pattern_that_matches_nothing_names_the_nearest():
    says = refused(model(), (r".*/query/kernel", "in out"))
    assert says.startswith("the target '.*/query/kernel' matches none of the 8 arrays; nearest: ")
    assert says.count("/kernel") == 5  # the pattern and all four kernels
    assert "none of the 8 arrays" in refused(model(), ("kernel", "in out"))  # a full match
    assert "the tree holds no arrays" in refused({"activation": jax.nn.gelu}, (".*", "in out"))


def test_each_suffix_of_a_list_must_match():
    says = refused(model(), (["q/kernel", "gate/kernel"], "in out"))
    assert says.startswith("the target 'gate/kernel' matches none of the 8 arrays; nearest: ")


def test_an_exclusion_that_matches_nothing():
    says = refused(model(), (".*/kernel", "in out"), exclude="attn/.*")
    assert says.startswith("exclude 'attn/.*' matches none of the 8 arrays; nearest: att")
    for exclude in (["kernel"], ["q/kernel"]):
        says = refused(model(), (".*/q/kernel", "in out"), exclude=exclude)
        assert says == f"the target '.*/q/kernel' matches nothing that {exclude} does not exclude"


def test_two_targets_for_one_weight_names_both():
    says = refused(model(), (".*/kernel", "in out"), (["q/kernel"], "in out"))
    assert says == (
        "attention/q/kernel: matched by two targets, '.*/kernel' and ('q/kernel',);"
        " narrow one of them"
    )


def test_roles_that_do_not_fit_the_axes():
    says = refused({"q": struct(32, 64, 256)}, ("q", "in out"))
    assert says == (
        "q: has 3 axes, shape 32x64x256, but the target 'q' gives roles for 2: 'in out'"
    )
    assert "scale: has 0 axes, shape scalar" in refused({"scale": struct()}, ("scale", "out"))


def test_an_integer_weight_needs_to_be_declared_quantized():
    tree = {"codes": struct(4, 8, dtype=jnp.int8)}
    says = refused(tree, ("codes", "in out"))
    assert says.startswith("codes: has dtype int8, which cannot be scaled; if these are codes")
    assert "quantized=True" in says
    plan = ha.plan(tree, ha.Target("codes", "in out", quantized=True))
    assert plan.count == 12 and ha.init(plan)["codes"].row.dtype == jnp.float32


def test_an_empty_weight():
    assert refused({"w": struct(0, 8)}, ("w", "in out")) == "w: is empty, shape 0x8; exclude it"


def test_a_tied_weight():
    table = jnp.ones((10, 4))
    tree = {"embed": table, "head": table, "other": jnp.ones((10, 4))}
    for path in ("embed", "head"):
        assert refused(tree, (path, "in out")).startswith(
            "head: is tied to embed, one array in two"
        )
    assert chosen(ha.plan(tree, ("other", "in out"))) == ["other"]
    assert chosen(ha.plan({**tree, "head": table.copy()}, ("embed", "in out"))) == ["embed"]
    shape = struct(10, 4)  # one shape in two places says nothing about the arrays
    assert chosen(ha.plan({"embed": shape, "head": shape}, ("head", "in out"))) == ["head"]


@pytest.mark.parametrize(
    ("pattern", "axes", "says"),
    [
        ("w", "in outt", "unknown axis role 'outt' in 'in outt'; use in, out, stack, -"),
        ("w", "", "the roles '' have no 'in' and no 'out' axis"),
        ("w", "stack -", "the roles 'stack -' have no 'in' and no 'out' axis"),
        ("(w", "in out", "the pattern '(w' is no regular expression: missing )"),
        ("", "in out", "an empty pattern selects nothing"),
        ([], "in out", "an empty pattern selects nothing"),
    ],
)
def test_a_target_that_cannot_be(pattern, axes, says):
    with pytest.raises(ha.PlanError, match=re.escape(says)):
        ha.Target(pattern, axes)


def test_unknown_sides():
    assert refused(model(), (".*/kernel", "in out"), sides="rows").endswith("not 'rows'")
