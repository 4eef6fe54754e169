"""Text generation with a key-value cache, for any function that decodes like a `Decoder`."""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.typing import ArrayLike

from hyperadapt_jax.models.decoder.model import Cache, init_cache
from hyperadapt_jax.models.layers import check_range

Array = jax.Array


NOT_FINITE = -1  # in place of a token whose logits are NaN or infinite


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("temperature", "top_p"),
    meta_fields=("top_k",),
)
@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is drawn. Another temperature or ``top_p`` does not compile again.

    Attributes:
      temperature: divides the logits.
      top_k: how many of the likeliest tokens may be drawn; None for all.
      top_p: tokens are drawn from the likeliest ones that together have this probability; None for
        all, which saves sorting the vocabulary.
    """

    temperature: ArrayLike = 1.0
    top_k: int | None = None
    top_p: ArrayLike | None = None


def generate(
    fn: Callable[..., Any],
    *trees: Any,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop_tokens: Sequence[int] = (),
    seed: int = 0,
) -> list[list[int]]:
    """Continues a batch of prompts.

    Prompts are padded on the left to one of a few lengths and the cache to one of a few sizes, so
    that calls of similar shape share one compiled program; it ends when every row has stopped.

    Args:
      fn: ``fn(*trees, tokens, mask=, cache=) -> (logits, cache)``, as `functional` gives for a
        `Decoder`, or what `hyperadapt_jax.adapt` makes of that. Keep the function: another one
        compiles again.
      *trees: what it takes before the tokens: the parameters, plain or merged, or the parameters
        and the scales.
      prompts: token ids of each row; rows may differ in length, none may be empty.
      max_new_tokens: most tokens that a row may get.
      temperature: zero takes the likeliest token; else it divides the logits before the draw.
      top_k: draw from this many of the likeliest tokens; all if not given.
      top_p: draw from the likeliest tokens that together have this probability, in (0, 1]; all if
        not given.
      stop_tokens: tokens that end a row, as a `DecoderConfig` has them in ``eos_tokens``.
      seed: of the draws.

    Returns:
      The new tokens of each row, up to and with its stop token; -1 where the logits are not finite,
      which ends the row too.

    Raises:
      ValueError: a prompt is empty or has a token outside the vocabulary, or a number is out of
        its range.

    >>> from hyperadapt_jax import models
    >>> config = models.config_from_dict(dict(model_type="llama", vocab_size=9, hidden_size=8,
    ...     intermediate_size=16, num_hidden_layers=2, num_attention_heads=2))
    >>> fn, params = models.functional(models.create(config))
    >>> rows = models.generate(fn, params, prompts=[[1, 2, 3], [4]], max_new_tokens=5)
    >>> [len(row) for row in rows]
    [5, 5]
    """
    max_new_tokens = _positive("max_new_tokens", max_new_tokens)
    if not (np.isfinite(temperature) and temperature >= 0.0):
        raise ValueError(f"temperature={temperature}: expected zero or more")
    if top_k is not None:
        top_k = _positive("top_k", top_k)
    if top_p is not None and not 0.0 < top_p <= 1.0:
        raise ValueError(f"top_p={top_p}: expected a number in (0, 1]")
    if len(prompts) == 0:
        return []
    rows = [_prompt(number, prompt) for number, prompt in enumerate(prompts)]
    tokens, mask = _pad_left(rows)
    slots = _bucket(max_new_tokens)
    prefill = _prefill.trace(fn, trees, tokens, mask, slots=tokens.shape[1] + slots)
    vocabulary = prefill.out_info[0].shape[-1]
    for number, row in enumerate(rows):
        check_range(f"prompts[{number}]", row, vocabulary)
    sampling = None
    if temperature > 0.0:
        sampling = Sampling(
            np.maximum(np.float32(temperature), np.finfo(np.float32).tiny),
            top_k,
            None if top_p is None or top_p == 1.0 else np.float32(top_p),
        )
    new, counts = _decode(
        fn,
        trees,
        tokens,
        mask,
        slots=slots,
        limit=np.int32(max_new_tokens),
        sampling=sampling,
        stop_tokens=np.asarray(stop_tokens, np.int32),
        rng=jax.random.key(seed),
    )
    # Whole in each process, where several hold the devices.
    new, counts = multihost_utils.process_allgather((new, counts), tiled=True)
    return [row[:count].tolist() for row, count in zip(new, counts, strict=True)]


@functools.partial(jax.jit, static_argnames=("fn", "slots"))
def _prefill(
    fn: Callable[..., Any], trees: tuple[Any, ...], tokens: Array, mask: Array, *, slots: int
) -> tuple[Array, Cache]:
    """The last place's logits, and the cache after ``tokens: [B, T]``; traced once for a shape."""
    return fn(*trees, tokens, mask=mask, cache=init_cache(tokens.shape[0], slots))


def decode(
    fn: Callable[..., Any],
    trees: tuple[Any, ...],
    tokens: Array,
    mask: Array,
    *,
    slots: int,
    limit: Array | int | None = None,
    sampling: Sampling | None = None,
    stop_tokens: Array | Sequence[int] = (),
    rng: Array | None = None,
) -> tuple[Array, Array]:
    """Continues a padded batch, as a pure function that can be traced, differentiated or adapted.

    Args:
      fn: as for `generate`.
      trees: what ``fn`` takes before the tokens.
      tokens: prompts ending at the last place, padded on the left, ``[B, T]`` integers.
      mask: True at tokens, ``[B, T]``.
      slots: room for new tokens, M.
      limit: most new tokens of a row, at most M; M if not given.
      sampling: how to draw; None takes the likeliest token.
      stop_tokens: tokens that end a row, ``[S]``.
      rng: key of the draws; needed with ``sampling``.

    Returns:
      The new tokens ``[B, M]``, zero after a row's end, and how many each row has, ``[B]``. A row
      ends with -1 where its logits are not finite.

    Raises:
      ValueError: there is no key to sample with.
    """
    batch, length = tokens.shape
    limit = jnp.asarray(slots if limit is None else limit, jnp.int32)
    stop_tokens = jnp.asarray(stop_tokens, jnp.int32)

    def choose(logits: Array, step: Array | int) -> Array:
        logits = logits[:, -1]
        if sampling is None:
            token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        elif rng is None:
            raise ValueError("rng: sampling draws by a key; pass one")
        else:
            token = _draw(logits, sampling, jax.random.fold_in(rng, step))
        # Minus infinity forbids a token; NaN and infinity forbid a choice.
        return jnp.where(jnp.isfinite(jnp.max(logits, axis=-1)), token, NOT_FINITE)

    def ends(token: Array) -> Array:
        return (token == NOT_FINITE) | jnp.isin(token, stop_tokens)

    class State(NamedTuple):
        step: Array
        cache: Cache
        last: Array
        new: Array
        done: Array
        counts: Array

    logits, cache = _prefill(fn, trees, tokens, mask, slots=length + slots)
    first = choose(logits, 0)
    start = State(
        step=jnp.ones((), jnp.int32),
        cache=cache,
        last=first,
        new=jnp.zeros((batch, slots), jnp.int32).at[:, 0].set(first),
        done=ends(first),
        counts=jnp.ones(batch, jnp.int32),
    )

    def more(state: State) -> Array:
        return (state.step < limit) & ~jnp.all(state.done)

    def refill(state: State) -> State:
        """Recomputes the cache, and steps back by one: `advance` gives the last token again."""
        written = jnp.broadcast_to(jnp.arange(slots) < state.step, (batch, slots))
        seen = jnp.concatenate([tokens, state.new.astype(tokens.dtype)], axis=1)
        seen_mask = jnp.concatenate([mask, written], axis=1)
        _, cache = _prefill(fn, trees, seen, seen_mask, slots=length + slots)
        last = length + state.step - 1
        valid = cache.valid.at[:, last].set(False)
        return state._replace(cache=cache._replace(valid=valid, length=last))

    def advance(state: State) -> State:
        logits, cache = fn(*trees, state.last[:, None], cache=state.cache)
        token = jnp.where(state.done, 0, choose(logits, state.step))
        return State(
            step=state.step + 1,
            cache=cache,
            last=token,
            new=jax.lax.dynamic_update_slice_in_dim(state.new, token[:, None], state.step, axis=1),
            done=state.done | ends(token),
            counts=state.counts + ~state.done,
        )

    if cache.good_until is not None:
        room = cache.good_until - jnp.max(jnp.sum(mask, axis=1, dtype=jnp.int32))
        start = jax.lax.while_loop(lambda s: more(s) & (s.step <= room), advance, start)
        start = jax.lax.cond(more(start) & (room >= 0), refill, lambda s: s, start)
    end = jax.lax.while_loop(more, advance, start)
    return end.new, end.counts


_decode = functools.partial(jax.jit, static_argnames=("fn", "slots"))(decode)


def _draw(logits: Array, sampling: Sampling, rng: Array) -> Array:
    """One token of each row of ``logits: [B, V]``, in the order temperature, top-k, top-p."""
    # From the largest on, so that no temperature makes them infinite.
    logits = (logits - jnp.max(logits, axis=-1, keepdims=True)) / sampling.temperature
    order = None
    if sampling.top_k is not None and sampling.top_k < logits.shape[-1]:
        logits, order = jax.lax.top_k(logits, sampling.top_k)
    elif sampling.top_p is not None:
        order = jnp.argsort(logits, axis=-1, descending=True)
        logits = jnp.take_along_axis(logits, order, axis=-1)
    if sampling.top_p is not None:
        probabilities = jax.nn.softmax(logits, axis=-1)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        # The likeliest token stays whatever rounding does to the sum before it.
        kept = (before < sampling.top_p) | (jnp.arange(logits.shape[-1]) == 0)
        logits = jnp.where(kept, logits, -jnp.inf)
    rngs = jax.random.split(rng, logits.shape[0])
    draw = jax.vmap(jax.random.categorical)(rngs, logits)
    if order is not None:
        draw = jnp.take_along_axis(order, draw[:, None], axis=-1)[:, 0]
    return draw.astype(jnp.int32)


def _bucket(length: int) -> int:
    """The next of a few lengths, 16 and four to each doubling: at most a fifth is padding."""
    if length <= 16:
        return 16
    step = 1 << ((length - 1).bit_length() - 3)
    return -(-length // step) * step


def _positive(name: str, value: int) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        number = 0
    if number < 1:
        raise ValueError(f"{name}={value}: expected a positive integer")
    return number


def _prompt(number: int, prompt: Sequence[int]) -> np.ndarray:
    """The tokens of a row, ``[T]``."""
    if len(prompt) == 0:
        raise ValueError(f"prompts[{number}] is empty: begin it with the model's first token")
    tokens = np.asarray(prompt)
    if tokens.ndim != 1 or not np.issubdtype(tokens.dtype, np.integer):
        raise ValueError(
            f"prompts[{number}]: expected token ids, found {tokens.dtype} {tokens.shape}"
        )
    return tokens


def _pad_left(prompts: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Tokens ``[B, T]`` that all end at the last place, and where they are."""
    length = _bucket(max(len(prompt) for prompt in prompts))
    tokens = np.zeros((len(prompts), length), np.int32)
    mask = np.zeros((len(prompts), length), bool)
    for row, prompt in enumerate(prompts):
        tokens[row, length - len(prompt) :] = prompt
        mask[row, length - len(prompt) :] = True
    return tokens, mask
