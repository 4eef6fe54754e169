"""A run's checkpoints: what trains, the optimizer, the step, the place in the data, the random key.

Never the base model: a checkpoint is three times the adapter's size. Orbax writes them while the
training waits, so that no second copy of the state is needed, and a checkpoint has its name only
when it is whole.
"""

from __future__ import annotations

import contextlib
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from hyperadapt_jax import paths

from ..errors import InputError, first_line
from ..parallel import processes
from ..run.folder import CHECKPOINTS

_REMOVED = ".removed"


class CheckpointMetadata(NamedTuple):
    """What a checkpoint holds besides its arrays.

    Attributes:
      data: the state of the iterator over the training data.
      base: the fingerprint of the frozen parameters.
      metrics: of the evaluation after this step; None if there was none.
      spent: seconds, tokens and sessions of the run so far.
      sources: `train.trainer.loop.Job.sources`; empty in checkpoints of before there were such.
    """

    data: dict[str, Any]
    base: str
    metrics: dict[str, float] | None
    spent: dict[str, float] = {}
    sources: dict[str, str] = {}


class Checkpoints:
    """The checkpoints in a run folder: the last two and the best are kept; a context manager.

    Two, since the older one stands in wherever the newer is being replaced.

    Args:
      folder: the run folder, which exists.
    """

    def __init__(self, folder: Path):
        self._folder = Path(folder).resolve() / CHECKPOINTS
        last = policies.LatestN(2)
        best = policies.BestN(get_metric_fn=_score, n=1, keep_checkpoints_without_metrics=False)
        options = ocp.CheckpointManagerOptions(
            best_fn=_score,
            preservation_policy=policies.AnyPreservationPolicy([last, best]),
            cleanup_tmp_directories=True,
            enable_async_checkpointing=False,
            # Renamed first: a process that is killed while it removes leaves no half checkpoint.
            todelete_subdir=_REMOVED,
        )
        with self._explained("opened"):
            self._manager = ocp.CheckpointManager(
                self._folder,
                options=options,
                item_handlers={
                    # Compressing needs a copy, and finds nothing to compress in trained numbers.
                    "state": ocp.PyTreeCheckpointHandler(use_compression=False),
                    "position": ocp.JsonCheckpointHandler(),
                },
            )

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        try:
            with self._explained("completed"):
                self._manager.close()
                self._clear()
        except InputError:
            if kind is None:  # else what ended the run is the thing to tell
                raise

    @property
    def steps(self) -> list[int]:
        """The steps that there are whole checkpoints of."""
        return sorted(self._manager.all_steps())

    def save(self, state: Any, position: CheckpointMetadata, score: float | None = None) -> None:
        """Writes a checkpoint.

        Args:
          state: a tree of arrays with a field ``step``. A checkpoint of that step is replaced.
          position: what else to keep.
          score: how good the model is, higher is better; None if that was not measured. One that
            is not finite is never the best.

        Raises:
          InputError: the checkpoint could not be written, as on a full disk.
        """
        measured = score is not None and math.isfinite(score)
        step = int(state.step)
        names, leaves, _ = paths.flatten(state)
        with self._explained("written"):
            self._clear()
            if step in self.steps:
                self._manager.delete(step)
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.PyTreeSave(dict(zip(names, leaves, strict=True))),
                    position=ocp.args.JsonSave(position._asdict()),
                ),
                metrics={"score": score} if measured else None,
            )

    def restore(self, like: Any, step: int | None = None) -> tuple[Any, CheckpointMetadata]:
        """Reads a checkpoint.

        Args:
          like: the state's tree, of arrays or of shapes; shapes, dtypes and shardings are restored.
          step: which one; the last if not given.

        Returns:
          The state, and what was kept with it.

        Raises:
          InputError: there is no checkpoint, or it is damaged, or not of such a state.
        """
        step = self._manager.latest_step() if step is None else step
        if step is None:
            raise InputError(f"there is no checkpoint in {self._folder}")
        names, leaves, treedef = paths.flatten(like)
        shapes = {
            name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
            for name, x in zip(names, leaves, strict=True)
        }
        with self._explained(
            f"read: remove {self._folder / str(step)} to fall back on the one before it"
        ):
            found = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.PyTreeRestore(
                        shapes, restore_args=ocp.checkpoint_utils.construct_restore_args(shapes)
                    ),
                    position=ocp.args.JsonRestore(),
                ),
            )
            state = treedef.unflatten([found.state[name] for name in names])
            return state, CheckpointMetadata(**found.position)

    @property
    def best(self) -> int | None:
        """The step with the highest score; None if none has one."""
        return self._manager.best_step()

    def _clear(self) -> None:
        """Frees the space of the checkpoints that are no longer kept."""
        if not processes.first():
            return
        for old in (self._folder / _REMOVED).glob("*"):
            shutil.rmtree(old, ignore_errors=True)

    @contextlib.contextmanager
    def _explained(self, what: str) -> Iterator[None]:
        """Whatever Orbax raises, as one line that names the folder."""
        try:
            yield
        except jax.errors.JaxRuntimeError:  # of devices, such as another process's that is gone
            raise
        except Exception as error:
            reason = first_line(error)
            if "structures do not match" in reason:
                raise InputError(
                    f"the checkpoints in {self._folder} are of another version of this program:"
                    " start another run, in another folder"
                ) from error
            if len(reason) > 200:  # the innermost cause comes last
                reason = f"{reason[:80]} ... {reason[-100:]}"
            raise InputError(
                f"a checkpoint in {self._folder} cannot be {what} ({reason})"
            ) from error


def _score(metrics: dict[str, float]) -> float:
    return metrics["score"]
