"""What would train, and what a step takes on a mesh: the plan, before anything is allocated."""

from __future__ import annotations

import dataclasses
import math
import textwrap
from pathlib import Path
from typing import Any, Literal

import huggingface_hub

from hyperadapt_jax import models
from hyperadapt_jax.tables import table

from .. import base, files, methods
from ..errors import InputError, first_line
from ..options import LARGEST, AdapterOptions, ModelOptions, Place, flag
from ..parallel.chips import CHIPS, seconds
from ..parallel.mesh import AXES, parse_mesh, parse_rules
from ..trainer.ahead import StepFacts, StepOptions, compile_step, planning, tpu_memory
from ..trainer.suggest import MOST, SIZES, TENSOR, USABLE, Suggestion, shapes_to_try, suggest

DEVICES = 1024  # that a step is compiled for at most


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Show what a method would train, and what a step of it takes and does on a mesh of devices.

    Reads the model's config.json and no weights, so that it takes seconds for a model of any size;
    of a repository of the hub, nothing else is fetched. What the weights turn out to lack, such as
    a pooler, a run trains fully as well.

    With --mesh or --batch-size, the training step is compiled too, ahead of time and for devices
    that need not exist: the bytes that a device holds, its products and collectives, the time that
    these take at least on some accelerators, and the fewest devices of a size that the step fits
    on. That takes a quarter of a minute, and without --no-suggest a few minutes.

    Examples:
      # An encoder with a new head of three classes.
      python -m train plan --model FacebookAI/roberta-base --labels 3
      # Queries and values alone, and the norms fully.
      python -m train plan --model Qwen/Qwen2.5-0.5B --targets qv --full '.*norm/scale'
      # A step of 256 rows on 256 devices, of which there need be none.
      python -m train plan --model meta-llama/Meta-Llama-3-8B --dtype bfloat16 --mesh fsdp=256 \\
          --batch-size 256 --max-length 2048
    """

    model: ModelOptions
    adapter: AdapterOptions = AdapterOptions()
    labels: int | None = None
    """Outputs of a new classification head on an encoder, which trains fully; 1 for regression.
    No head if not given."""
    mesh: str | None = None
    """Sizes of the axes data, fsdp and tensor of a mesh of devices, such as fsdp=4,tensor=2; one
    that is left out is 1. One device if not given. The devices need not exist."""
    rules: tuple[str, ...] = ()
    """Which axes of the mesh divide which axis of the weights, in place of the usual ones, as the
    recipes that train have it."""
    batch_size: int | None = None
    """Rows of one optimizer step; with --mesh and without it, 32."""
    max_length: int = 512
    """Tokens of a row."""
    accumulate: int = 1
    """Parts that a batch is computed in, one after the other."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """The optimizer; muon is for --method full."""
    loss_chunk: int | None = None
    """Tokens whose logits exist at once; 0 is all. If not given, as the recipes that train."""
    topology: str | None = None
    """A slice of TPUs, such as v5e:16x16, which need not exist: a step's memory is then that of the
    program of the TPU's own compiler. Needs libtpu."""
    suggest: bool = True
    """Look for the fewest devices of each size that the step fits on, too."""
    json: Path | None = None
    """File to write the numbers to."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "max_length", "accumulate"):
            value = getattr(self, name)
            if value is not None and not 1 <= value <= LARGEST:
                raise InputError(f"{flag(name)} {value}: give a number from 1 to {LARGEST}")
        if self.loss_chunk is not None and self.loss_chunk < 0:
            raise InputError(
                f"--loss-chunk {self.loss_chunk}: give a number of tokens, or 0 for all at once"
            )
        if self.rows % self.accumulate:
            raise InputError(
                f"--batch-size {self.rows} cannot be computed in {self.accumulate} equal parts:"
                " change --accumulate or --batch-size"
            )
        fields = {field.name: field.default for field in dataclasses.fields(self)}
        for name in ("json", "rules", "topology", "loss_chunk", "accumulate", "max_length"):
            if getattr(self, name) != fields[name] and not self.step:
                raise InputError(f"{flag(name)}: is for a step: give --batch-size or --mesh too")
        if self.model.attention == "cudnn" and self.step:
            raise InputError("--attention cudnn: compiles on its GPU alone: leave it out of a plan")
        parse_rules(self.rules)
        if math.prod(self.shape) > DEVICES:
            raise InputError(f"--mesh {self.mesh}: give no more than {DEVICES} devices")

    @property
    def step(self) -> bool:
        """Whether a step is asked for."""
        return self.mesh is not None or self.batch_size is not None

    @property
    def rows(self) -> int:
        """Of a step."""
        return 32 if self.batch_size is None else self.batch_size

    @property
    def shape(self) -> tuple[int, int, int]:
        """Sizes of the mesh's axes."""
        sizes = {} if self.mesh is None else parse_mesh(self.mesh)
        for name, size in sizes.items():
            if size < 1:
                raise InputError(
                    f"--mesh {self.mesh}: the devices need not exist, so there is no rest of them:"
                    f" give {name} a number"
                )
        data, fsdp, tensor = (sizes.get(name, 1) for name in AXES)
        return data, fsdp, tensor


def run(options: Options) -> None:
    """Prints the plan.

    Raises:
      InputError: there is no such model, a target matches nothing, nothing would train, or an axis
        of the mesh divides nothing.
    """
    if options.labels is not None and options.labels < 1:
        raise InputError(f"--labels {options.labels}: give at least 1")
    model = _config_alone(options.model)
    described = base.load_abstract(model, options.labels)
    print(methods.table(described, methods.tune(described, options.adapter)))
    if not options.step:
        return
    config = described.config
    if options.max_length > config.max_length:
        raise InputError(
            f"--max-length {options.max_length}: the model takes {config.max_length} tokens"
        )
    if isinstance(config, models.EncoderConfig) and options.labels is None:
        raise InputError("--labels: an encoder's step needs a head: give its outputs")
    step = StepOptions(
        model=model,
        adapter=options.adapter,
        labels=options.labels,
        optimizer=options.optimizer,
        shape=options.shape,
        rules=options.rules,
        batch_size=options.rows,
        max_length=options.max_length,
        accumulate=options.accumulate,
        loss_chunk=options.loss_chunk,
    )
    shapes = shapes_to_try(options.rows) if options.suggest else []
    most = max(math.prod(shape) for shape in (step.shape, *shapes))
    found: list[Suggestion] = []
    with planning(most, model.dtype) as call:
        facts: StepFacts = call(compile_step, step)
        if options.topology is not None:
            of_tpu = call(tpu_memory, step, options.topology)
            facts = dataclasses.replace(facts, memory=of_tpu, topology=options.topology)
        print("\n" + show(facts), flush=True)
        if options.suggest:
            found = list(suggest(step, call))
            print("\n" + show_suggestions(found), flush=True)
    if options.json is not None:
        files.write_json(options.json, numbers(facts, found))


def show(facts: StepFacts) -> str:
    """What a step takes and does, as text."""
    step, memory, work = facts.options, facts.memory, facts.work
    parts = f", in {step.accumulate} parts" if step.accumulate > 1 else ""
    devices = "device" if step.devices == 1 else "devices"
    head = (
        f"a step: {facts.rows} rows of {step.max_length} tokens{parts}, {step.model.dtype},"
        f" --remat {step.model.remat}, on {step.mesh}, {step.devices} {devices}"
    )
    holds = {
        "frozen weights": facts.frozen,
        "what trains": facts.trainable,
        "optimizer's state": facts.optimizer,
        "batch": facts.batch,
        "activations, gradients, temporaries": facts.working,
        "together": facts.total,
    }
    rows = [[name, f"{size / 1e9:,.3f}"] for name, size in holds.items()]
    held = table(["a device holds", "GB"], rows, "GB")
    does: list[list[Any]] = [["products", "", f"{work.flops / 1e12:,.3f} TFLOP", ""]]
    does.append(["their operands, results", "", f"{work.traffic / 1e9:,.3f} GB", ""])
    for kind, each in work.collectives.items():
        moved = f"{each.received / 1e9:,.3f} GB"
        does.append([kind, f"{each.times:,}", f"{each.bytes / 1e9:,.3f} GB", moved])
    did = table(["a device does", "times", "size", "received"], does, "times size received")
    chips = []
    for chip in CHIPS:
        time = seconds(work, chip, step.devices)
        links = "-" if time.links is None else f"{1e3 * time.links:,.1f}"
        fits = "yes" if memory.total <= USABLE * chip.memory else "no"
        chips.append(
            [
                chip.name,
                fits,
                f"{1e3 * time.compute:,.1f}",
                f"{1e3 * time.memory:,.1f}",
                links,
                f"{1e3 * time.overlapped:,.1f}",
                f"{1e3 * time.serial:,.1f}",
                time.limit if time.links is not None else f"{time.limit} or network",
            ]
        )
    header = ["at the least, ms", "fits", "compute", "memory", "links", "overlapped", "serial"]
    times = table([*header, "limit"], chips, " ".join(header[2:]))
    return "\n\n".join([head, held, did, times, "\n".join(_notes(facts))])


def _notes(facts: StepFacts) -> list[str]:
    step = facts.options
    fitting = [f"{size}" for size in SIZES if facts.total <= USABLE * size * 1e9]
    those = f"devices of {', '.join(fitting)}" if fitting else f"no device of up to {SIZES[-1]}"
    usable = f"{USABLE:.0%} of a device may be taken, the rest is the runtime's"
    lines = [f"fits {those} GB: {usable}", *facts.notes]
    if facts.rows > step.batch_size:
        lines.append(f"the {step.batch_size} rows are filled up to {facts.rows}, which it divides")
    if facts.work.unbounded:
        lines.append(f"{facts.work.unbounded} loops do not say how often they run: counted once")
    lines.append(
        f"compiled by XLA for {step.devices} CPU devices that need not exist, in"
        f" {facts.seconds:.0f} s and {facts.peak / 1e9:.1f} GB"
    )
    if facts.topology:
        lines.append(f"memory: by the compiler of TPU {facts.topology}")
    elif step.model.dtype == "bfloat16":
        lines.append(
            "XLA for CPU computes bfloat16 in float32, with copies of the weights: float16, of the"
            " same size, stands in. No attention kernel is taken for granted, so that a layer's"
            " scores are there, in float32"
        )
    lines += [
        "compute: products at the chip's peak rate for bfloat16. memory: their operands and"
        " results, once. links: what a device receives in rings, by half of what is published for"
        " both directions; - beyond the chips that they join. All three overlapped are the least"
        " that a step can take, serial the least if nothing overlaps",
    ]
    return [textwrap.fill(f"* {line}", 98, subsequent_indent="  ") for line in lines]


def show_suggestions(found: list[Suggestion]) -> str:
    """The smallest meshes, as text."""
    rows: list[list[Any]] = []
    for each in found:
        if each.options is None:
            rows.append([f"{each.size} GB", "-", "-", "none that was tried", "", ""])
            continue
        step = each.options
        total = f"{each.total / 1e9:,.2f}" if each.compiled else f"~{each.total / 1e9:,.2f}"
        ways = step.model.remat, step.accumulate
        rows.append([f"{each.size} GB", step.devices, total, step.mesh, *ways])
    header = ["devices of", "fewest", "GB", "--mesh", "--remat", "--accumulate"]
    made = table(header, rows, "fewest GB --accumulate")
    tried = (
        f"* tried: up to {MOST} devices, fsdp of 1, 2, 4, ... that divides the rows, alone and with"
        f" tensor={TENSOR}; --remat dots and full, and every --accumulate that divides the rows."
        " ~ where the bytes are drawn from steps of one and two rows a device, and not of this very"
        " program"
    )
    return f"{made}\n\n{textwrap.fill(tried, 98, subsequent_indent='  ')}"


def numbers(facts: StepFacts, found: list[Suggestion]) -> dict[str, Any]:
    """The plan, for programs: bytes, FLOPs and seconds."""
    step = facts.options
    return {
        "mesh": dict(zip(AXES, step.shape, strict=True)),
        "devices": step.devices,
        "rows": facts.rows,
        "max_length": step.max_length,
        "accumulate": step.accumulate,
        "dtype": step.model.dtype,
        "remat": step.model.remat,
        "bytes": {
            "frozen": facts.frozen,
            "trainable": facts.trainable,
            "optimizer": facts.optimizer,
            "batch": facts.batch,
            "working": facts.working,
            "total": facts.total,
        },
        "flops": facts.work.flops,
        "product_bytes": facts.work.traffic,
        "collectives": {kind: each._asdict() for kind, each in facts.work.collectives.items()},
        "chips": {
            chip.name: {
                **dataclasses.asdict(time := seconds(facts.work, chip, step.devices)),
                "limit": time.limit,
                "fits": facts.total <= USABLE * chip.memory,
            }
            for chip in CHIPS
        },
        "suggestions": {
            str(each.size): None
            if each.options is None
            else {
                "devices": each.options.devices,
                "mesh": each.options.mesh,
                "remat": each.options.model.remat,
                "accumulate": each.options.accumulate,
                "total": each.total,
                "compiled": each.compiled,
            }
            for each in found
        },
        "notes": list(facts.notes),
        "compile_seconds": facts.seconds,
        "compile_peak_bytes": facts.peak,
    }


def _config_alone(options: ModelOptions) -> ModelOptions:
    """The options with a folder in place of a repository of the hub: its config.json, no more."""
    if Path(options.model).expanduser().exists():
        return options
    try:
        file = huggingface_hub.hf_hub_download(
            options.model, "config.json", revision=options.revision
        )
    except Exception as error:  # the client's own, the network's, the file system's: one answer
        raise InputError(
            f"--model {options.model} is no folder, and its config.json could not be"
            f" downloaded from the hub: {first_line(error)} Check the name, the network"
            " (HF_HUB_OFFLINE) and, for a gated repository, the login (HF_TOKEN)"
        ) from error
    return dataclasses.replace(options, model=Place(str(Path(file).parent)))
