"""Texts and their classes, which are discovered in the training rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import datasets
import numpy as np

from hyperadapt_jax import paths
from hyperadapt_jax.methods import Tuning

from ..data import readers
from ..data.columns import Column, Text
from ..data.examples import Examples
from ..errors import InputError
from ..metrics import finite
from ..options import Place
from .classification import Classification, predicted
from .held_out import HeldOut
from .task import Evaluation, Metrics, Setting, Training

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CONFUSION = "confusion.png"
MOST = 1_000  # classes; more are a sign of a column of something else
SHOWN = 24  # classes that are named in the figure


@dataclasses.dataclass(frozen=True, kw_only=True)
class Classify(HeldOut, Classification):
    """Single texts, each of one class, such as news and their topics."""

    eval_rows: int = 1_000
    text: str = "text"
    """Column of the texts."""
    label: str = "label"
    """Column of the classes: names or numbers."""
    classes: tuple[str, ...] = ()
    """All classes, in the order of the model's outputs; those of --data if not given."""

    name = "classify"
    primary = "accuracy"

    @property
    def columns(self) -> dict[str, Column]:
        if self.text == self.label:
            raise InputError(f"--text and --label are both {self.text!r}: give two columns")
        return {self.text: Text(), self.label: Text()}

    @property
    def num_labels(self) -> int:
        return len(self.classes)

    def resolve(self) -> Classify:
        """The same task with the classes of its rows; classes that are numbers are in their order.

        Raises:
          InputError: the rows cannot be read, or hold one class alone or more than `MOST`.
        """
        classes = self.classes
        if not classes:
            classes = tuple(sorted(self._named(self.data, self.split).unique("label"), key=_order))
        if len(set(classes)) < len(classes):
            raise InputError(f"--classes {' '.join(classes)}: one is named twice")
        if not 2 <= len(classes) <= MOST:
            some = ", ".join(map(repr, classes[:3]))
            raise InputError(
                f"--label {self.label}: there are {len(classes)} classes ({some}): give a column"
                f" with 2 to {MOST}"
            )
        return dataclasses.replace(self, classes=classes)

    def prepare(self, setting: Setting) -> tuple[Training, Evaluation]:
        rows, held_out = self.rows(setting.seed)
        training, digest, summary = self.examples(rows, "training rows", setting)
        name = "training rows"
        train = Training(training.data, {name: digest}, {name: summary}, training.places)
        return train, self.measured_on(setting, held_out)

    def measure(self, tuning: Tuning, examples: Examples) -> Callable[[Any], Metrics]:
        """A function from what trains to accuracy and macro F1 on the held-out rows.

        Macro F1 is the mean of the F1 of each class that is a label or a prediction of one row at
        least. Rows whose outputs are not finite are wrong, and counted as ``nonfinite``; the
        function raises InputError where all are.
        """
        from sklearn.metrics import f1_score

        outputs = self.outputs(tuning, {"held-out rows": examples})

        def evaluate(trainable: Any) -> Metrics:
            ((logits, labels),) = outputs(trainable).values()
            predictions, good = predicted(logits, labels)

            def score(rows: np.ndarray) -> Metrics:
                wanted, found = labels[rows], predictions[rows]
                accuracy = float(np.mean(found == wanted))
                f1 = float(f1_score(wanted, found, average="macro", zero_division=0.0))
                return {"accuracy": accuracy, "macro_f1": f1} | finite.count(good[rows].tolist())

            return self.scored(score, labels.tolist())

        return evaluate

    def measured_on(self, setting: Setting, held_out: datasets.Dataset) -> Evaluation:
        examples, digest, summary = self.examples(held_out, "held-out rows", setting)

        def figures(tuning: Tuning, trainable: Any) -> dict[str, Figure]:
            ((logits, labels),) = self.outputs(tuning, {"": examples})(trainable).values()
            rows = self.reporting(labels.tolist())
            predictions = predicted(logits, labels)[0]
            return {CONFUSION: confusion(predictions[rows], labels[rows], self.classes)}

        name = "held-out rows"
        return Evaluation(
            lambda tuning: self.measure(tuning, examples),
            {name: digest},
            {name: summary},
            figures=figures,
        )

    def read(self, source: Place | readers.Rows, split: str) -> datasets.Dataset:
        """Rows with a ``text``, the number of its class as ``label``, and their places."""
        return self._numbered(self._named(source, split))

    def _named(self, source: Place | readers.Rows, split: str) -> datasets.Dataset:
        """Rows whose ``label`` is the name of a class."""
        rows = super().read(source, split)
        return rows.rename_columns({self.text: "text", self.label: "label"})

    def _numbered(self, rows: datasets.Dataset) -> datasets.Dataset:
        """The rows with their classes' numbers in place of their names."""
        numbers = {name: number for number, name in enumerate(self.classes)}
        labels = rows["label"][:]
        for row, label in enumerate(labels):
            if label not in numbers:
                raise InputError(
                    f"{rows[row][readers.PLACE]}: column {self.label!r} is {label!r}, which is none"
                    f" of the {len(numbers)} classes; {paths.suggest(label, numbers)}"
                )
        column = np.array([numbers[label] for label in labels], np.int32)
        return rows.remove_columns("label").add_column("label", column)


def confusion(predictions: np.ndarray, labels: np.ndarray, names: Sequence[str]) -> Figure:
    """Draws how often each class is predicted as which.

    Args:
      predictions: class numbers, ``[N]``.
      labels: class numbers, ``[N]``.
      names: of the classes.

    Returns:
      A figure: a row for each true class, whose color is the share of its rows; where there are
      few classes, their names and counts.
    """
    from matplotlib.figure import Figure

    counts = np.zeros((len(names), len(names)), int)
    np.add.at(counts, (labels, predictions), 1)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    few = len(names) <= SHOWN
    size = max(4.0, 1.6 + 0.45 * min(len(names), SHOWN))
    figure = Figure(figsize=(size + 0.8, size), dpi=120, layout="constrained")
    ax = figure.subplots()
    image = ax.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, ax=ax, label="share of the true class", shrink=0.8)
    ax.set(xlabel="predicted class", ylabel="true class")
    if few:
        shown = [name if len(name) <= 16 else f"{name[:15]}…" for name in names]
        ax.set_xticks(range(len(names)), shown, rotation=45, ha="right", rotation_mode="anchor")
        ax.set_yticks(range(len(names)), shown)
        for (row, column), count in np.ndenumerate(counts):
            color = "white" if shares[row, column] > 0.6 else "black"
            ax.text(column, row, f"{count:,}", ha="center", va="center", color=color, fontsize=8)
    return figure


def _order(name: str) -> tuple[bool, int, str]:
    """Numbers first, by their value; then names, by their letters."""
    number = name.isascii() and name.isdecimal()
    return not number, int(name) if number else 0, name
