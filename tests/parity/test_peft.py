"""Methods and adapter files against Hugging Face PEFT, which must be installed."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import optax  # noqa: E402
import transformers  # noqa: E402

import hyperadapt_jax as ha  # noqa: E402
from hyperadapt_jax import models, paths  # noqa: E402
from hyperadapt_jax.methods import IA3, DoRA, HiRA, LoRA, VeRA  # noqa: E402
from tests.models import cases, reference  # noqa: E402

RNG = np.random.default_rng(0)
SIZES = {"up": (7, 12), "down": (12, 5)}
STEPS, RATE = 20, 3e-2


def normal(*shape: int) -> np.ndarray:
    return RNG.normal(size=shape).astype(np.float32)


KERNELS = {name: normal(*shape) / 3 for name, shape in SIZES.items()}
X, Y = normal(9, 7), normal(9, 5)


def fn(params: Any, x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ params["up"]) @ params["down"]


class Torch(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for name, (inputs, outputs) in SIZES.items():
            linear = torch.nn.Linear(inputs, outputs, bias=False)
            linear.weight.data = torch.tensor(KERNELS[name].T)
            setattr(self, name, linear)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.tanh(self.up(x)))


NAMES = list(SIZES)
LORA = {"down": ("lora_A.default.weight", "T"), "up": ("lora_B.default.weight", "")}
# Of each method: itself, PEFT's configuration, and how each array that trains is called there.
METHODS: dict[str, tuple[Any, Any, dict[str, tuple[str, str]]]] = {
    "lora": (
        LoRA(rank=3, alpha=5.0),
        peft.LoraConfig(r=3, lora_alpha=5, target_modules=NAMES),
        LORA,
    ),
    "rslora": (
        LoRA(rank=4, alpha=6.0, rslora=True),
        peft.LoraConfig(r=4, lora_alpha=6, use_rslora=True, target_modules=NAMES),
        LORA,
    ),
    "dora": (
        DoRA(rank=2, alpha=4.0),
        peft.LoraConfig(r=2, lora_alpha=4, use_dora=True, target_modules=NAMES),
        LORA | {"row": ("lora_magnitude_vector.default.weight", "norm")},
    ),
    "vera": (
        VeRA(rank=6),
        peft.VeraConfig(r=6, target_modules=NAMES),
        {"d": ("vera_lambda_d.default", ""), "b": ("vera_lambda_b.default", "")},
    ),
    "ia3": (
        IA3(),
        peft.IA3Config(target_modules=NAMES, feedforward_modules=["down"]),
        {"row": ("ia3_l.default", "one"), "col": ("ia3_l.default", "one")},
    ),
    "hira": (
        HiRA(rank=2),
        peft.HiraConfig(r=2, target_modules=NAMES),
        {"down": ("hira_A.default", "T"), "up": ("hira_B.default", "")},
    ),
}


def there(array: Any, how: str, path: str) -> np.ndarray:
    """An array that trains, as PEFT holds it."""
    array = np.asarray(array)
    norm = np.linalg.norm(KERNELS[path], axis=0)
    return {"T": lambda: array.T, "norm": lambda: array + norm, "one": lambda: 1 + array}.get(
        how, lambda: array
    )()


def both(name: str) -> tuple[ha.methods.Tuning, torch.nn.Module, dict[tuple[str, str], Any]]:
    """A method here and there with the same random values, and PEFT's parameter of each array."""
    method, config, names = METHODS[name]
    roles = {"up": "- out", "down": "in -"} if name == "ia3" else dict.fromkeys(NAMES, "in out")
    plan = ha.plan(KERNELS, *roles.items())
    params = jax.tree.map(jnp.asarray, KERNELS)
    tuning = ha.methods.tune(method, fn, params, plan, key=jax.random.key(0))
    leaves, treedef = jax.tree.flatten(tuning.trainable)
    moved = [leaf + 0.2 * normal(*leaf.shape) for leaf in leaves]
    tuning = tuning.__class__(**{**vars(tuning), "trainable": treedef.unflatten(moved)})

    model = peft.get_peft_model(Torch(), config)
    parameters = {}
    for path, trained in tuning.trainable["scales"].items():
        module = getattr(model.base_model.model, path)
        for field, (there_name, how) in names.items():
            if (array := getattr(trained, field, None)) is None:
                continue
            head, *rest = there_name.split(".")
            found = getattr(module, head)
            for part in rest:
                found = getattr(found, part) if part == "weight" else found[part]
            found.data = torch.tensor(there(array, how, path)).reshape(found.shape)
            parameters[path, field] = found, how
    if name == "vera":
        a, b = method.factors(12, 12)
        model.base_model.vera_A["default"].data = torch.tensor(np.asarray(a))
        model.base_model.vera_B["default"].data = torch.tensor(np.asarray(b))
    return tuning, model, parameters


@pytest.mark.parametrize("name", METHODS)
def test_outputs_gradients_and_20_steps_equal_those_of_peft(name: str) -> None:
    tuning, model, parameters = both(name)

    def loss(trainable: Any) -> Any:
        outputs = tuning.forward(trainable, tuning.frozen, X)
        return jnp.mean((outputs - Y) ** 2), outputs

    optimizer = optax.adam(RATE)
    trainable, state = tuning.trainable, optimizer.init(tuning.trainable)
    theirs = torch.optim.Adam([p for p, _ in parameters.values()], RATE)
    step = jax.jit(jax.value_and_grad(loss, has_aux=True))
    curves: list[tuple[float, float]] = []
    for i in range(STEPS):
        (value, outputs), grads = step(trainable)
        wanted = model(torch.tensor(X))
        error = torch.mean((wanted - torch.tensor(Y)) ** 2)
        theirs.zero_grad()
        error.backward()
        curves.append((float(value), float(error.detach())))
        if i == 0:
            np.testing.assert_allclose(outputs, wanted.detach().numpy(), rtol=1e-4, atol=1e-5)
            for (path, field), (parameter, how) in parameters.items():
                grad = np.asarray(getattr(grads["scales"][path], field))
                grad = grad.T if how == "T" else grad
                want = parameter.grad.numpy().reshape(grad.shape)
                np.testing.assert_allclose(grad, want, rtol=1e-4, atol=1e-5)
        theirs.step()
        updates, state = optimizer.update(grads, state, trainable)
        trainable = optax.apply_updates(trainable, updates)
    ours, others = np.array(curves).T
    np.testing.assert_allclose(ours, others, rtol=1e-4)
    assert ours[-1] < 0.9 * ours[0]


# Files

LLAMA = "llama3"
CLASSIFIERS = ["bert-classifier", "roberta-classifier", "distilbert-classifier"]


def random_adapter(model: Any, params: Any, kind: str) -> ha.Adapter:
    """What adapts every linear of a model, and its head if it has one, all at random."""
    plan = ha.plan(params, *models.targets(model, "all-linear"))
    if kind != "vectors":
        plan = plan.with_low_rank(3, ["row"] if kind == "dora" else [])
    scales = jax.tree.map(
        lambda x: jnp.asarray(0.2 * normal(*x.shape)), ha.init(plan, jax.random.key(0))
    )
    arrays = paths.arrays(params)
    head = {path: leaf for path, leaf in arrays.items() if path.startswith("classifier/")}
    full = {path: jnp.asarray(leaf + 0.1 * normal(*leaf.shape)) for path, leaf in head.items()}
    return ha.Adapter(scales, full, base_model="org/base")


def outputs_of(
    base: pathlib.Path, adapter: pathlib.Path, inputs: Any, *, merged: bool, dtype: str = "float32"
) -> dict[str, np.ndarray]:
    """What transformers and PEFT make of the folders of a base and of an adapter."""
    name = json.loads((base / "config.json").read_text())["architectures"][0]
    model = getattr(transformers, name).from_pretrained(
        base, attn_implementation="eager", dtype=getattr(torch, dtype)
    )
    model = peft.PeftModel.from_pretrained(model, adapter).eval()
    model = model.merge_and_unload(safe_merge=True) if merged else model
    with torch.no_grad():
        found = reference.outputs_of(model, inputs, {})
    return {key: value.float().numpy() for key, value in found.items()}


def close(found: Any, wanted: Any, mask: np.ndarray) -> None:
    """Equal where the tokens are real, of outputs that have any."""
    found, wanted = np.asarray(found), np.asarray(wanted)
    if found.shape[: mask.ndim] == mask.shape:
        found, wanted = found[mask], wanted[mask]
    np.testing.assert_allclose(found, wanted, atol=1e-4, rtol=1e-4)


def saved_base(name: str, folder: pathlib.Path, dtype: str = "float32") -> tuple[Any, ...]:
    """A model's folder, and the model, its function, its parameters and a batch."""
    case = cases.CASES[name]
    reference.torch_model(case.config, seed=5).to(getattr(torch, dtype)).save_pretrained(folder)
    model = models.load(folder, dtype=dtype, param_dtype=dtype)
    f, params = models.functional(model)
    return model, f, params, cases.batch(model.config, case.padding, seed=5)


@pytest.mark.parametrize("kind", ["vectors", "lora", "dora"])
@pytest.mark.parametrize("name", [LLAMA, "phi3", *CLASSIFIERS])
def test_an_exported_adapter_gives_the_same_in_peft(
    name: str, kind: str, tmp_path: pathlib.Path
) -> None:
    """Unmerged and merged, on a base with stacked layers, fused matrices, biases, a trained head.

    Read again, it is the same adapter.
    """
    base, folder = tmp_path / "base", tmp_path / "adapter"
    model, f, params, inputs = saved_base(name, base)
    adapter, table = random_adapter(model, params, kind), models.tensors(model.config)
    task = "SEQ_CLS" if getattr(model.config, "num_labels", None) else "CAUSAL_LM"
    ha.peft.save(folder, adapter, params, table, task_type=task)
    applied, scales = adapter.apply(params)
    adapted = ha.adapt(f)(applied, scales, inputs["tokens"], mask=inputs["mask"])
    for merged in (False, True):
        wanted = outputs_of(base, folder, inputs, merged=merged)
        for key, value in wanted.items():
            close(cases.output_of(adapted)[key], value, inputs["mask"])
    again = ha.load(folder, params, tensors=table)
    assert again.scales.keys() == scales.keys() and again.full.keys() == adapter.full.keys()
    for got, want in zip(jax.tree.leaves(again.scales), jax.tree.leaves(scales), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5)
    for path, leaf in adapter.full.items():
        np.testing.assert_array_equal(again.full[path], leaf)


@pytest.mark.parametrize("kind", ["vectors", "lora"])
def test_a_base_in_bfloat16_gives_the_same_logits_and_weights(
    kind: str, tmp_path: pathlib.Path
) -> None:
    """As far as bfloat16 goes: weights within one rounding, logits about as near as PEFT's."""
    base, folder = tmp_path / "base", tmp_path / "adapter"
    model, f, params, inputs = saved_base(LLAMA, base, "bfloat16")
    adapter, table = random_adapter(model, params, kind), models.tensors(model.config)
    ha.peft.save(folder, adapter, params, table)
    mask = inputs["mask"]
    exact = outputs_of(base, folder, inputs, merged=False)["logits"][mask]

    def error(logits: Any) -> float:
        found = np.asarray(logits, np.float32)[mask]
        return float(np.linalg.norm(found - exact) / np.linalg.norm(exact))

    ours = error(ha.adapt(f)(params, adapter.scales, inputs["tokens"], mask=mask))
    for merged in (False, True):
        theirs = outputs_of(base, folder, inputs, merged=merged, dtype="bfloat16")["logits"]
        assert ours < 1.5 * error(theirs) < 0.1, (ours, error(theirs))
    dense = paths.arrays(ha.merge(params, adapter.scales))
    there = transformers.LlamaForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    there = peft.PeftModel.from_pretrained(there, folder).merge_and_unload().state_dict()
    for place in ha.peft.places(table, {path: leaf.shape for path, leaf in dense.items()}):
        if place.path in adapter.scales:
            weight = place.of(np.asarray(dense[place.path], np.float32))
            theirs = there[place.name].float().numpy()
            spacing = 2**-8 * np.abs(weight).max()
            np.testing.assert_allclose(theirs, weight, rtol=2**-6, atol=spacing)


READ = {
    "lora": peft.LoraConfig(
        r=3,
        lora_alpha=5,
        target_modules=["q_proj", "down_proj"],
        rank_pattern={"layers.1.mlp.down_proj": 2},
        alpha_pattern={"q_proj": 7},
    ),
    "rslora": peft.LoraConfig(r=3, lora_alpha=5, use_rslora=True, target_modules=["v_proj"]),
    "dora": peft.LoraConfig(r=2, use_dora=True, target_modules=["q_proj", "up_proj"]),
    "vera": peft.VeraConfig(r=8, target_modules=["q_proj", "v_proj", "o_proj"]),
    "ia3": peft.IA3Config(
        target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]
    ),
}


@pytest.mark.parametrize("name", READ)
def test_an_adapter_of_peft_gives_the_same_here(name: str, tmp_path: pathlib.Path) -> None:
    """Of a model with biases, of which (IA)^3 scales some; with a norm that trained fully."""
    base, folder = tmp_path / "base", tmp_path / "adapter"
    model, f, params, inputs = saved_base("qwen2", base)
    config = READ[name]
    config.modules_to_save = ["model.norm"]
    there = peft.get_peft_model(transformers.Qwen2ForCausalLM.from_pretrained(base), config)
    with torch.no_grad():
        for parameter in there.parameters():
            if parameter.requires_grad:
                parameter += torch.tensor(0.1 * normal(*parameter.shape))
    there.save_pretrained(folder)
    wanted = outputs_of(base, folder, inputs, merged=False)
    adapter = ha.load(folder, params, tensors=models.tensors(model.config))
    applied, scales = adapter.apply(params)
    adapted = ha.adapt(f)(applied, scales, inputs["tokens"], mask=inputs["mask"])
    close(adapted, wanted["logits"], inputs["mask"])
    assert "norm/scale" in adapter.full
