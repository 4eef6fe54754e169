"""Fine-tune a decoder on instructions and answers."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Callable
from typing import Any

import datasets
import jax
import jax.numpy as jnp
import numpy as np

from hyperadapt_jax import models
from hyperadapt_jax.methods import Tuning

from .. import answers, base, chat, data, finite, losses, methods, options, runs
from ..answers import Questions, Score
from ..batches import Batches, stream
from ..chat import Form, Template
from ..data import Column, Text
from ..errors import InputError
from ..loop import Task, fit
from ..options import AdapterOptions, ModelOptions, OptimizerOptions, Place, RunOptions

PREDICTIONS = "predictions.jsonl"
SHOWN = 3  # generations in the report


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Fine-tune a decoder on instructions and answers; the loss is of the answers alone.

    Rows are read as --prompt and --answer say, or are whole chats in a column "messages", shown by
    the tokenizer's chat template. Held-out rows give the loss before, during and after; the best
    step's adapter is kept. The model's own answers to some of them go to predictions.jsonl.

    Examples:
      # Questions and answers in two columns; the base model shows no chat template.
      python -m train sft --model Qwen/Qwen2.5-0.5B --data rows.jsonl \\
          --folder runs/sft --prompt '{question}' --answer ' {answer}' --epochs 3
      # Whole chats in a column "messages", scored by the model's own answers.
      python -m train sft --model Qwen/Qwen2.5-0.5B-Instruct --data chats.parquet \\
          --folder runs/chat --score last-number --questions 200 --dtype bfloat16
      # A run that was stopped, from where it was saved.
      python -m train sft --config runs/chat/config.yaml --folder runs/chat --resume
    """

    data: Place
    """Training rows: a .json, .jsonl, .parquet, .csv or .tsv file, a folder of such, or a data set
    of the hub."""
    data_config: str | None = None
    """Configuration of a data set of the hub that has several."""
    split: str = "train"
    """Split of a folder or a data set of the hub."""
    eval_data: Place | None = None
    """Held-out rows; if not given, some of the training rows are held out."""
    eval_split: str = "test"
    """Split of --eval-data where that is a folder or a data set of the hub."""
    eval_rows: int = 500
    """How many rows are held out; with --eval-data, how many of its first are used."""
    prompt: str | None = None
    r"""What the model is given, a text with columns' names in braces: '{question}\n'. If not given,
    rows are chats in the column "messages"."""
    answer: str = "{answer}"
    """What it is to say, likewise; the end-of-text token is added."""
    chat: bool = False
    """Show prompt and answer as turns of a chat, by the tokenizer's chat template."""
    max_length: int = 512
    """Most tokens of an example; longer ones are cut, and counted."""
    pack: bool = False
    """Fill rows of --max-length tokens with several examples, which do not see one another."""
    eval_batch_size: int = 32
    """Rows that are evaluated at once."""
    score: Score = "none"
    """How the model's own answers are marked at each evaluation: the same text, the last number, or
    the first of all references that is named. The best step is then the one with most of them."""
    reference: str | None = None
    """What is right, as --answer; that itself if not given."""
    questions: int = 64
    """How many held-out rows the model answers."""
    max_new_tokens: int = 128
    """Most tokens of an answer of the model's own."""
    model: ModelOptions
    adapter: AdapterOptions = AdapterOptions()
    optimizer: OptimizerOptions = OptimizerOptions()
    run: RunOptions

    @property
    def form(self) -> Form:
        """How rows read."""
        prompt = None if self.prompt is None else Template(self.prompt)
        return Form(prompt, Template(self.answer), self.chat)

    @property
    def columns(self) -> dict[str, Column]:
        """The columns that rows must have."""
        return self.form.columns | dict.fromkeys(self.right.columns if self.right else (), Text())

    @property
    def right(self) -> Template | None:
        """What is right; None for the last turn of a chat."""
        if self.reference is None and self.prompt is None:
            return None
        return Template(self.answer if self.reference is None else self.reference)


def run(chosen: Options) -> None:
    """Trains, and leaves the best adapter, predictions and a report in the run folder.

    Raises:
      InputError: the model, the data or the folder cannot be used.
    """
    config = options.flat(chosen, "sft")
    tell = (lambda text: None) if chosen.run.quiet else print
    described = describe(chosen)
    plan = methods.table(described, methods.tune(described, chosen.adapter))
    tell(plan)
    tokenizer = base.tokenizer(chosen.model)
    training, held_out = read(chosen)
    examples = chat.examples(training, chosen.form, tokenizer, chosen.max_length)
    base.check_tokens((row["tokens"] for row in examples.data), tokenizer, chosen.model)
    told = examples.tell("training rows", chosen.max_length, tell)
    digests, also_told = measured(chosen, held_out, tokenizer, tell)
    counts = {"training rows": told, "held-out rows": also_told}
    sources = {"tokenizer": data.identity(tokenizer), "training rows": data.digest(examples.data)}
    sources |= digests
    batches = Batches(
        examples.data,
        chosen.run.batch_size,
        pack=chosen.max_length if chosen.pack else None,
        seed=chosen.run.seed,
        epochs=chosen.run.passes,
        divisor=chosen.run.accumulate,
        places=examples.places,
    )
    if batches.batch_size < chosen.run.batch_size:
        tell(f"--batch-size {chosen.run.batch_size}: there are no more than {len(examples.data)},"
             " which each step takes")  # fmt: skip
    questions = ask(chosen, described, held_out, tokenizer)
    if skipped := len(questions.prompts) - len(questions.asked):
        tell(f"{skipped} of {len(questions.prompts)} questions are not asked: with"
             " --max-new-tokens they are too long for the model")  # fmt: skip
    with runs.claim(chosen.run.folder, config, resume=chosen.run.resume) as folder:
        loaded = base.load(chosen.model, quiet=chosen.run.quiet)
        tuning = methods.tune(loaded, chosen.adapter)
        result = fit(
            Task(
                name="sft",
                base=loaded,
                tuning=tuning,
                loss=losses.next_token(tuning),
                batches=batches,
                evaluate=evaluation(chosen, tuning, held_out, tokenizer, questions),
                score=lambda metrics: metrics.get("accuracy", -metrics["loss"]),
                sources=sources,
            ),
            folder,
            optimizer=chosen.optimizer,
            run=chosen.run,
            metadata=config,
        )
        generations: list[dict[str, Any]] = []
        if questions.prompts:
            found = questions.answers(tuning.forward, result.trainable, tuning.frozen)
            questions.save(folder / PREDICTIONS, found)
            with open(folder / PREDICTIONS, encoding="utf-8") as lines:
                generations = [json.loads(line) for line in itertools.islice(lines, SHOWN)]
        command = options.command("sft", chosen)
        facts = result.facts | counts
        title = f"Fine-tuning: {chosen.adapter.method}"
        runs.report(folder, title, plan, result.rows, facts, command, generations)
    tell(f"\n{result}\nadapter, metrics, predictions, curves and report are in {folder}")


def describe(chosen: Options) -> base.Base:
    """The model without its weights, known to be a decoder with room for what is asked.

    Raises:
      InputError: it is not, or an option is out of its range.
    """
    for name in ("eval_rows", "eval_batch_size", "max_new_tokens"):
        if getattr(chosen, name) < 1:
            flag = name.replace("_", "-")
            raise InputError(f"--{flag} {getattr(chosen, name)}: give at least 1")
    if chosen.questions < 0 or (chosen.score != "none" and not chosen.questions):
        raise InputError(f"--questions {chosen.questions}: give at least 1, or no --score")
    described = base.describe(chosen.model)
    config = described.config
    if not isinstance(config, models.DecoderConfig):
        raise InputError(
            f"--model {chosen.model.model} is a {config.family} encoder: this recipe needs a"
            " decoder"
        )
    if chosen.max_length > config.max_length:
        raise InputError(f"--max-length {chosen.max_length}: the model takes {config.max_length}")
    if chosen.questions and chosen.max_new_tokens >= config.max_length:
        raise InputError(
            f"--max-new-tokens {chosen.max_new_tokens}: the model takes {config.max_length} tokens,"
            " with the prompt"
        )
    return described


def read(chosen: Options) -> tuple[datasets.Dataset, datasets.Dataset]:
    """The training rows and the held-out ones."""
    columns = chosen.columns
    rows = data.read(
        chosen.data, columns, split=chosen.split, config=chosen.data_config, places=True
    )
    if chosen.eval_data is not None:
        return rows, read_eval(chosen)
    if len(rows) <= chosen.eval_rows:
        raise InputError(
            f"--eval-rows {chosen.eval_rows} leaves nothing of {len(rows)} rows to train on: give"
            " fewer, or --eval-data"
        )
    order = np.random.default_rng(chosen.run.seed).permutation(len(rows))
    held_out, training = np.split(order, [chosen.eval_rows])
    return rows.select(np.sort(training)), rows.select(np.sort(held_out))


def read_eval(chosen: Options) -> datasets.Dataset:
    """The first rows of ``--eval-data``."""
    rows = data.read(
        chosen.eval_data,
        chosen.columns,
        split=chosen.eval_split,
        config=chosen.data_config,
        places=True,
    )
    return rows.select(range(min(len(rows), chosen.eval_rows)))


def measured(
    chosen: Options, held_out: datasets.Dataset, tokenizer: Any, tell: Callable[[str], None]
) -> tuple[dict[str, str], str]:
    """The digest of what the held-out rows hold, under its name; and what is told of their loss."""
    examples = chat.examples(held_out, chosen.form, tokenizer, chosen.max_length)
    base.check_tokens((row["tokens"] for row in examples.data), tokenizer, chosen.model)
    told = examples.tell("held-out rows", chosen.max_length, tell)
    right = references(chosen, held_out, tokenizer)
    return {"held-out rows": data.digest(examples.data, *right)}, told


def references(chosen: Options, rows: datasets.Dataset, tokenizer: Any) -> list[str]:
    """What is right, of each row."""
    if chosen.right is None:
        return chat.references(rows, tokenizer)
    return [chosen.right.fill(row) for row in rows]


def ask(
    chosen: Options, described: base.Base, held_out: datasets.Dataset, tokenizer: Any
) -> Questions:
    """The questions of the first held-out rows."""
    rows = held_out.select(range(min(len(held_out), chosen.questions)))
    right = references(chosen, held_out, tokenizer)
    questions = Questions(
        prompts=chat.prompts(rows, chosen.form, tokenizer) if len(rows) else [],
        references=right[: len(rows)],
        choices=tuple(dict.fromkeys(right)),
        score=chosen.score,
        tokenizer=tokenizer,
        stop_tokens=tuple(sorted({tokenizer.eos_token_id, *described.config.eos_tokens})),
        max_new_tokens=chosen.max_new_tokens,
        longest=described.config.max_length - chosen.max_new_tokens,
        rows=chosen.eval_batch_size,
    )
    base.check_tokens(questions.prompts, tokenizer, chosen.model)
    answers.mark(chosen.score, right, right)  # refuses those that cannot be marked
    return questions


def evaluation(
    chosen: Options,
    tuning: Tuning,
    held_out: datasets.Dataset,
    tokenizer: Any,
    questions: Questions,
):
    """A function from what trains to the metrics of the held-out rows.

    ``loss`` is the mean over the answers' tokens, in nats, ``perplexity`` its exponential, and
    ``accuracy`` the share of right answers among the model's own, where they are marked. Rows and
    answers whose outputs are not finite are counted, as ``nonfinite`` and ``nonfinite_answers``;
    the function raises InputError where all are.
    """
    examples = chat.examples(held_out, chosen.form, tokenizer, chosen.max_length)
    batches = Batches(examples.data, chosen.eval_batch_size, shuffle=False)
    token_losses = losses.token_losses(tuning)

    @jax.jit
    def measure(trainable, frozen, batch):
        found, counts = token_losses(trainable, frozen, batch)
        good = jnp.all(jnp.isfinite(found), axis=1, where=counts)
        return jnp.sum(found, where=counts), jnp.sum(counts), good

    def evaluate(trainable) -> dict[str, float]:
        total, weight, kept = 0.0, 0.0, []
        for batch in stream(batches):
            real = batch.pop("rows") >= 0
            part, count, good = measure(trainable, tuning.frozen, batch)
            total, weight = total + float(part), weight + float(count)
            kept += np.asarray(good)[real].tolist()
        mean = total / weight
        # A float has room for the perplexity of 709 nats.
        metrics = {"loss": mean, "perplexity": math.inf if mean > 709 else math.exp(mean)}
        metrics |= finite.count(kept)
        if questions.score != "none":
            found = questions.answers(tuning.forward, trainable, tuning.frozen)
            metrics |= questions.accuracy(found) | finite.count(found, "nonfinite_answers")
        return metrics

    return evaluate
