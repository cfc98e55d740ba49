"""The commands. Each imports what it needs when it runs, so that ``--help`` is quick."""

from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from circuits.errors import CircuitsError

if TYPE_CHECKING:
    from pandas import DataFrame

    from circuits.datasets import FactDataset, Task
    from circuits.models import HookedTransformer
    from circuits.sweeps import SweepPlan

app = typer.Typer(
    name="circuits",
    help="Which parts of a model do two tasks share, and what happens without them?",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


def _version(show: bool | None) -> None:
    if show:
        from circuits.storage import library_version

        typer.echo(library_version())
        raise typer.Exit


@app.callback()
def circuits(
    version: Annotated[
        bool | None, typer.Option("--version", help="Say which version this is.", callback=_version, is_eager=True)
    ] = None,
) -> None:
    """Which parts of a model do two tasks share, and what happens without them?"""


class Recipe(StrEnum):
    """Training recipes."""

    MIXED = "mixed"
    TWO_STAGE = "two-stage"
    TWO_STAGE_GENTLE = "two-stage-gentle"
    BIO_ONLY = "bio-only"


class Split(StrEnum):
    """What a task can be made of."""

    BIO = "bio"
    QA_ID = "qa_id"
    QA_OOD = "qa_ood"
    QA_ID_UNSEEN = "qa_id_unseen"
    QA_OOD_UNSEEN = "qa_ood_unseen"


class Family(StrEnum):
    """Model families of the study."""

    LLAMA = "llama"
    PYTHIA = "pythia"


class MaskMode(StrEnum):
    """What masked parameters become."""

    REVERT = "revert"
    ZERO = "zero"
    MEAN = "mean"


class HeadMode(StrEnum):
    """What an ablated head puts out."""

    ZERO = "zero"
    MEAN = "mean"
    MEAN_BY_POSITION = "mean_by_position"
    RESAMPLE = "resample"


class Source(StrEnum):
    """Which run a head's output is taken from."""

    BIO = "bio"
    PERSON = "person"


Model = Annotated[Path, typer.Argument(help="Folder of a Hugging Face checkpoint.", show_default=False)]
Data = Annotated[
    Path | None,
    typer.Option(
        help="Folder of the dataset; a checkpoint made by 'circuits train' knows its own.", show_default=False
    ),
]
Seed = Annotated[int, typer.Option(help="Seed of every random draw.")]
Csv = Annotated[bool, typer.Option("--csv", help="Also write the table as CSV.")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16 or float16.")]
Device = Annotated[
    str | None, typer.Option(help="cpu, cuda, cuda:1 …; default: CUDA if there is any.", show_default=False)
]
Examples = Annotated[
    int | None, typer.Option(help="Use so many examples, drawn with the seed; default: all.", min=1, show_default=False)
]


def _table_path(path: Path) -> None:
    from circuits.storage import check_ending

    check_ending(path, (".parquet",), "table")


@contextmanager
def _busy(text: str) -> Iterator[None]:
    """Say what is going on, on a terminal, until it is done."""
    from rich.console import Console

    with Console(stderr=True).status(text):
        yield


@contextmanager
def _resumable() -> Iterator[None]:
    """Say how to go on when the user interrupts."""
    try:
        yield
    except KeyboardInterrupt as error:
        how = "; ".join(getattr(error, "__notes__", ["give the same command again to go on"]))
        typer.echo(f"circuits: interrupted; {how}", err=True)
        raise typer.Exit(130) from None


def _say(text: str) -> None:
    from rich.console import Console

    Console(highlight=False, soft_wrap=True).print(text, markup=False)


def _cell(value: Any) -> str:
    if not isinstance(value, float):
        return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 or (value and value == int(value)) else f"{value:.4g}"


def _show(table: "DataFrame", title: str, most: int = 24) -> None:
    """Print a table for a person."""
    from rich.console import Console
    from rich.table import Table

    shown = Table(title=title, title_justify="left", header_style="bold")
    numbers = table.select_dtypes("number").columns
    for column in table.columns:
        shown.add_column(str(column), justify="right" if column in numbers else "left", overflow="fold")
    for row in table.head(most).itertuples(index=False):
        shown.add_row(*(_cell(value) for value in row))
    console = Console()
    console.print(shown)
    if len(table) > most:
        console.print(f"… and {len(table) - most} more rows", style="dim")


def _dataset(data: Path | None, model: Path) -> "FactDataset":
    from circuits.datasets import FactDataset, dataset_of

    if not model.is_dir():
        raise CircuitsError(f"there is no folder {model}: give the path of a checkpoint on this machine")
    return dataset_of(model) if data is None else FactDataset(data)


def _load(model: Path, dtype: str = "float32", device: str | None = None) -> "HookedTransformer":
    with _busy(f"loading {model}"):
        from circuits.models import load_model

        return load_model(model, dtype, device)


def _task(dataset: "FactDataset", split: str, model: "HookedTransformer", examples: int | None, seed: int) -> "Task":
    from circuits.datasets import Task

    if model.tokenizer is None:
        raise CircuitsError("the checkpoint has no tokenizer: save one beside its weights")
    task = Task.from_dataset(dataset, split, model.tokenizer)
    return task if examples is None else task.sample(examples, seed)


def _facts(model: "HookedTransformer", dataset: "FactDataset", seed: int, **settings: Any) -> dict[str, Any]:
    """What a table came from."""
    from circuits.models import facts_of

    return {**facts_of(model), "dataset": dataset.fingerprint, "seed": seed, "settings": settings}


def _heads(names: list[str] | None, model: "HookedTransformer") -> list[Any] | None:
    from circuits.models import shape_of
    from circuits.units import Head

    shape = shape_of(model)
    return [Head.parse(name, shape) for name in names] if names else None


def _check_names(names: list[str] | None) -> None:
    """Refuse what is no head's name before anything is loaded."""
    from circuits.units import Head

    for name in names or ():
        Head.parse(name)


def _is_folder(path: Path) -> bool:
    """Whether a result goes into the folder of a sweep, and not into a file."""
    return not path.suffix


def _run_sweep(plan: "SweepPlan", out: Path, executor: str = "serial", workers: int | None = None) -> None:
    with _busy("starting"):
        from circuits.sweeps import run_sweep
    with _resumable():
        table = run_sweep(plan, out, executor, workers)
    _show(_effects(table), f"{out / 'table.parquet'}: {len(table):,} rows, the largest effects first", 12)


def _effects(table: "DataFrame") -> "DataFrame":
    """What a sweep's table says first: the largest effects."""
    effects = [column for column in table if column.endswith("_effect")]
    order = "log_prob_effect" if "log_prob_effect" in effects else effects[-1]
    what = ["units", "mode", *(["site"] if table["site"].any() else []), "positions", "task"]
    return table.sort_values(order, key=abs, ascending=False, kind="stable")[[*what, *effects]]


@app.command()
def data(
    out: Annotated[Path, typer.Option(help="Folder for the dataset.")] = Path("data/facts"),
    people: Annotated[int, typer.Option(help="Number of people, 2 to 144000.")] = 200,
    qa_id_fraction: Annotated[float, typer.Option(help="Share of people whose questions are in training.")] = 0.5,
    biographies: Annotated[int, typer.Option(help="Biographies of each person.")] = 3,
    wordings: Annotated[int, typer.Option(help="Wordings of each attribute, 1 to 5.")] = 5,
    order: Annotated[str, typer.Option(help="Order of sentences: permuted or fixed.")] = "permuted",
    mention: Annotated[str, typer.Option(help="name in every sentence, or pronoun after the first.")] = "name",
    row: Annotated[str, typer.Option(help="One sentence or one biography a row.")] = "sentence",
    seed: Seed = 0,
) -> None:
    """Make up people, their biographies and questions."""
    from circuits.datasets import DatasetSettings, make_dataset

    settings = DatasetSettings(
        people=people,
        qa_id_fraction=qa_id_fraction,
        biographies=biographies,
        wordings=wordings,
        order=order,
        mention=mention,
        row=row,
        seed=seed,
    )
    with _busy(f"making {people} people"):
        dataset = make_dataset(out, settings)
    _say(f"{out}: {people} people, fingerprint {dataset.fingerprint}")
    _say("answers: " + ", ".join(f"{split} {count}" for split, count in dataset.counts.items()))


@app.command()
def train(
    data: Annotated[Path, typer.Option(help="Folder of the dataset.")] = Path("data/facts"),
    out: Annotated[Path, typer.Option(help="Folder for the checkpoints: pre, and one for each stage.")] = Path(
        "runs/checkpoints"
    ),
    recipe: Annotated[
        list[Recipe] | None,
        typer.Option(help="What to train; may be given several times. Default: mixed and two-stage."),
    ] = None,
    start: Annotated[str, typer.Option(help="tiny-llama, tiny-pythia, or the folder of a checkpoint.")] = "tiny-llama",
    steps: Annotated[int, typer.Option(help="Optimizer steps of mixed training, and of each of two stages.")] = 1000,
    rows: Annotated[int, typer.Option(help="Rows in one step of mixed training.")] = 96,
    qa_share: Annotated[float, typer.Option(help="Share of those rows that are questions.")] = 1 / 3,
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate.")] = 2e-3,
    gentle_learning_rate: Annotated[float, typer.Option(help="Peak rate of the gentle second stage.")] = 1e-4,
    dtype: Annotated[str, typer.Option(help="float32, or bfloat16 mixed precision.")] = "float32",
    seed: Seed = 0,
) -> None:
    """Train models on biographies and questions. Started again, it goes on where it was."""
    from circuits.datasets import FactDataset

    dataset = FactDataset(data)
    with _busy("starting"):
        import torch

        from circuits.progress import bar
        from circuits.training import Optimisation
        from circuits.training import train as train_recipe

    optimisation = Optimisation(
        steps=steps,
        rows=rows,
        qa_share=qa_share,
        learning_rate=learning_rate,
        gentle_learning_rate=gentle_learning_rate,
        dtype=dtype,
    )
    torch.set_flush_denormal(True)
    bars: dict[str, Any] = {}

    def progress(stage: str, step: int, total: int) -> None:
        if stage not in bars:
            bars[stage] = bar(f"train {stage}", total, "step")
        bars[stage].update(step - bars[stage].n)
        if step == total:
            bars[stage].close()

    for chosen in recipe or [Recipe.MIXED, Recipe.TWO_STAGE]:
        with _resumable():
            folders = train_recipe(chosen.value, dataset, out, start, optimisation, seed, progress=progress)
        for folder in folders:
            import pandas

            last = pandas.read_parquet(folder / "curve.parquet").iloc[-1]
            _say(f"{folder}: BIO {last['bio']:.1%}, QA-ID {last['qa_id']:.1%}, QA-OOD {last['qa_ood']:.1%}")


@app.command()
def evaluate(
    model: Model,
    data: Data = None,
    split: Annotated[list[Split] | None, typer.Option(help="What to score; default: every split.")] = None,
    out: Annotated[Path | None, typer.Option(help="Parquet file for one row per answer.", show_default=False)] = None,
    examples: Examples = None,
    dtype: Dtype = "float32",
    device: Device = None,
    csv: Csv = False,
    seed: Seed = 0,
) -> None:
    """Score a checkpoint: exact match and log-probability of every answer."""
    if out is not None:
        _table_path(out)
    dataset = _dataset(data, model)
    loaded = _load(model, dtype, device)
    import pandas

    from circuits.metrics import METRICS
    from circuits.metrics import evaluate as score
    from circuits.storage import write_table

    tables = []
    for chosen in split or list(Split):
        task = _task(dataset, chosen.value, loaded, examples, seed)
        tables.append(score(loaded, task).assign(split=chosen.value))
    table = pandas.concat(tables, ignore_index=True)
    if out is not None:
        write_table(out, table, _facts(loaded, dataset, seed, examples=examples), csv)
    means = table.groupby("split", sort=False)[list(METRICS)].mean().astype(float)
    _show(means.assign(answers=table.groupby("split").size()).reset_index(), str(model))


@app.command()
def trace(
    model: Model,
    data: Data = None,
    split: Annotated[list[Split] | None, typer.Option(help="Tasks to trace; default: bio and qa_id.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for a trace file and hook-point tables per task.")] = Path(
        "runs/traces"
    ),
    statistic: Annotated[str, typer.Option(help="Of each gradient: abs, square or signed.")] = "abs",
    loss: Annotated[str, typer.Option(help="Over answer tokens, or all tokens.")] = "answer",
    examples: Examples = None,
    batch_size: Annotated[int, typer.Option(help="Examples in one pass.", min=1)] = 32,
    dtype: Dtype = "float32",
    device: Device = None,
    csv: Csv = False,
    seed: Seed = 0,
) -> None:
    """Trace a task's gradients at every parameter of heads and neurons."""
    dataset = _dataset(data, model)
    loaded = _load(model, dtype, device)
    from circuits.storage import write_table
    from circuits.tracing import trace_gradients
    from circuits.units import Head, Neuron

    for chosen in split or [Split.BIO, Split.QA_ID]:
        task = _task(dataset, chosen.value, loaded, examples, seed)
        traced = trace_gradients(loaded, task, statistic, loss, batch_size)
        traced.save(out / f"{chosen.value}.safetensors")
        for kind in (Head, Neuron):
            facts = _facts(loaded, dataset, seed, examples=examples, statistic=statistic, loss=loss)
            write_table(out / f"{chosen.value}_{kind.NOUN}s.parquet", traced.units(kind), facts, csv)
        _say(f"{out / chosen.value}.safetensors: {traced!r}")


@app.command()
def share(
    traces: Annotated[list[Path], typer.Argument(help="Trace files of two or more tasks.", show_default=False)],
    fraction: Annotated[float, typer.Option(help="k: top fraction of parameters in each influenced set.")] = 0.01,
    out: Annotated[Path, typer.Option(help="Folder for mask.safetensors, sharing.json and tables.")] = Path(
        "runs/shared"
    ),
    draws: Annotated[int, typer.Option(help="Permutations of the control.", min=1)] = 5,
    csv: Csv = False,
    seed: Seed = 0,
) -> None:
    """Find the parameters that tasks share, and how many each head and neuron has."""
    with _busy("reading traces"):
        import pandas

        from circuits.masks import shared_parameters, shared_size, sharing
        from circuits.storage import write_json, write_table
        from circuits.tracing import GradientTrace
        from circuits.units import Head, Neuron

        if len({path.resolve() for path in traces}) < len(traces):
            raise CircuitsError("a trace was given twice: sharing takes traces of different tasks")
        loaded = [GradientTrace.load(path) for path in traces]
        mask = shared_parameters(loaded, fraction)
        report = sharing(loaded, fraction, draws, seed)
        heads, neurons = shared_size(mask, Head), shared_size(mask, Neuron)
    mask.save(out / "mask.safetensors")
    write_json(out / "sharing.json", {**report, "provenance": mask.provenance})
    for name, table in {"heads": heads, "neurons": neurons}.items():
        write_table(out / f"{name}.parquet", table, {"model": mask.model, "seed": seed, "mask": mask.provenance}, csv)
    _show(pandas.DataFrame({"": list(report), "value": [_cell(value) for value in report.values()]}), str(mask))
    _show(heads.sort_values("size", ascending=False), "Shared Size of heads", 10)


@app.command()
def ablate(
    model: Model,
    data: Data = None,
    mask: Annotated[
        Path | None, typer.Option(help="Ablate this parameter mask; without it, sweep heads.", show_default=False)
    ] = None,
    pre: Annotated[
        Path | None, typer.Option(help="Checkpoint before fine-tuning, to revert a mask to.", show_default=False)
    ] = None,
    mask_mode: Annotated[MaskMode, typer.Option(help="What masked parameters become.")] = MaskMode.REVERT,
    draws: Annotated[int, typer.Option(help="Random masks to compare with.", min=1)] = 5,
    head: Annotated[
        list[str] | None,
        typer.Option(help="A head to ablate alone, such as L2H1; may be repeated. Default: every head."),
    ] = None,
    mode: Annotated[
        list[HeadMode] | None,
        typer.Option(help="What heads put out; default: zero and mean (over the first split)."),
    ] = None,
    split: Annotated[list[Split] | None, typer.Option(help="What to score; default: bio, qa_id and qa_ood.")] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Parquet file, or for heads a folder: a sweep that goes on when it is interrupted. "
            "Default: runs/mask_ablation.parquet or runs/head_ablation.parquet.",
            show_default=False,
        ),
    ] = None,
    examples: Examples = None,
    dtype: Dtype = "float32",
    device: Device = None,
    csv: Csv = False,
    seed: Seed = 0,
) -> None:
    """Ablate a parameter mask (--mask), or every head alone."""
    out = out or Path(f"runs/{'head' if mask is None else 'mask'}_ablation.parquet")
    if mask is not None or not _is_folder(out):
        _table_path(out)
    _check_names(head)
    if mask is not None and (head or mode):
        raise CircuitsError("a mask and heads were given: ablate one kind at a time")
    if mask is None and (pre is not None or mask_mode is not MaskMode.REVERT):
        raise CircuitsError("--pre and --mask-mode are for a mask: name its file with --mask")
    if mask is not None and mask_mode is MaskMode.REVERT and pre is None:
        raise CircuitsError("reverting a mask needs the model before fine-tuning: name its folder with --pre")
    splits = split or [Split.BIO, Split.QA_ID, Split.QA_OOD]
    modes = [chosen.value for chosen in mode or [HeadMode.ZERO, HeadMode.MEAN]]
    if _is_folder(out):
        from circuits.sweeps import SweepPlan

        plan = SweepPlan(
            model,
            dataset=data,
            tasks=[chosen.value for chosen in splits],
            examples=examples,
            units=head or "heads",
            modes=modes,
            seed=seed,
            dtype=dtype,
            device=device,
        )
        _run_sweep(plan, out)
        return
    dataset = _dataset(data, model)
    from circuits.storage import write_table

    if mask is not None:
        from circuits.masks import ParameterMask, ablate_mask

        loaded_mask = ParameterMask.load(mask)
    loaded = _load(model, dtype, device)
    if mask is not None:
        loaded_mask.check(loaded)
        before = None if pre is None else _load(pre, dtype, device)
        tasks = [_task(dataset, chosen.value, loaded, examples, seed) for chosen in splits]
        table = ablate_mask(loaded, loaded_mask, tasks, before, mask_mode.value, draws, seed)
        settings: dict[str, Any] = {"mask": loaded_mask.provenance, "mode": mask_mode.value, "draws": draws}
        shown = table.groupby(["condition", "task"], sort=False)[["exact_match", "log_prob"]].mean().reset_index()
    else:
        from circuits.sweeps import sweep_heads

        heads = _heads(head, loaded)
        tasks = [_task(dataset, chosen.value, loaded, examples, seed) for chosen in splits]
        table = sweep_heads(loaded, tasks, modes, heads=heads)
        settings = {"heads": head, "modes": modes}
        columns = ["head", "mode", "task", "exact_match_effect", "log_prob_effect"]
        shown = table.sort_values("log_prob_effect")[columns]
    write_table(out, table, _facts(loaded, dataset, seed, examples=examples, **settings), csv)
    _show(shown, f"{out}")


@app.command()
def patch(
    model: Model,
    data: Data = None,
    source: Annotated[
        Source,
        typer.Option("--from", help="The same person's biography, or another person's run of the same question."),
    ] = Source.PERSON,
    split: Annotated[Split, typer.Option(help="The run that is changed: a question split.")] = Split.QA_OOD,
    head: Annotated[
        list[str] | None,
        typer.Option(help="A head to patch alone, such as L2H1; may be repeated. Default: every head."),
    ] = None,
    out: Annotated[
        Path, typer.Option(help="Parquet file, or a folder: a sweep that goes on when it is interrupted.")
    ] = Path("runs/patches.parquet"),
    examples: Annotated[int, typer.Option(help="Use so many examples, drawn with the seed.", min=1)] = 200,
    dtype: Dtype = "float32",
    device: Device = None,
    csv: Csv = False,
    seed: Seed = 0,
) -> None:
    """Patch every head's output from another run into the question's run."""
    if not _is_folder(out):
        _table_path(out)
    _check_names(head)
    if _is_folder(out):
        from circuits.sweeps import SweepPlan

        plan = SweepPlan(
            model,
            dataset=data,
            tasks=split.value,
            examples=examples,
            units=head or "heads",
            modes="patch",
            source="formats" if source is Source.BIO else "people",
            seed=seed,
            dtype=dtype,
            device=device,
        )
        _run_sweep(plan, out)
        return
    dataset = _dataset(data, model)
    loaded = _load(model, dtype, device)
    from circuits.interventions import pair_formats, pair_people
    from circuits.storage import write_table
    from circuits.sweeps import sweep_patches

    heads = _heads(head, loaded)
    target = _task(dataset, split.value, loaded, examples, seed)
    if source is Source.BIO:
        other = pair_formats(target, _task(dataset, "bio", loaded, None, seed))
    else:
        other = pair_people(target, seed)
    table = sweep_patches(loaded, other, target, source.value, heads)
    settings = {"source": source.value, "split": split.value, "examples": examples, "heads": head}
    write_table(out, table, _facts(loaded, dataset, seed, **settings), csv)
    columns = ["head", "exact_match_effect", "log_prob_effect", "source_exact_match"]
    shown = table.sort_values("log_prob_effect")[[column for column in columns if column in table]]
    _show(shown, f"{out}: source_exact_match is how often the other run's answer is given")


sweep = typer.Typer(help="Run many interventions as one job that survives interruption.", no_args_is_help=True)
app.add_typer(sweep, name="sweep")


@sweep.command("run")
def run_plan(
    plan: Annotated[
        Path, typer.Argument(help="YAML or TOML file with the settings of circuits.SweepPlan.", show_default=False)
    ],
    out: Annotated[
        Path, typer.Option(help="Folder: plan.json, parts, and at the end table.parquet and table.csv.")
    ] = Path("runs/sweep"),
    executor: Annotated[str, typer.Option(help="serial, or processes: several on this machine.")] = "serial",
    workers: Annotated[
        int | None, typer.Option(help="Number of processes; default: one for each core.", min=1, show_default=False)
    ] = None,
) -> None:
    """Run a sweep, or what is missing of one. Several of this command may share one folder."""
    with _busy(f"reading {plan}"):
        from circuits.sweeps import SweepPlan

        read = SweepPlan.read(plan)
    _run_sweep(read, out, executor, workers)


@sweep.command("show")
def show_sweep(
    out: Annotated[Path, typer.Argument(help="Folder of a sweep.", show_default=False)],
    most: Annotated[int, typer.Option(help="Rows to show.", min=0)] = 12,
) -> None:
    """Tell how far a sweep is, what it does, and the largest effects so far."""
    with _busy(f"reading {out}"):
        import pandas

        from circuits.sweeps import sweep_state

        state = sweep_state(out)
    _say(f"{out}: {state.done} of {state.jobs} jobs finished, {len(state.table):,} of {state.interventions:,} rows")
    settings = {name: value for name, value in vars(state.plan).items() if value is not None}
    settings |= {f"{name} (content)": state.facts.get(name) for name in ("model", "dataset")}
    shown = [", ".join(value) if isinstance(value, tuple) else str(value) for value in settings.values()]
    _show(pandas.DataFrame({"setting": list(settings), "value": shown}), "", len(settings))
    if len(state.table):
        _show(_effects(state.table), "largest effects", most)


@app.command()
def attention(
    model: Model,
    head: Annotated[str, typer.Option(help="The head, such as L2H1.", show_default=False)],
    person: Annotated[
        int | None,
        typer.Option(help="Number of the person; default: a QA-OOD person drawn with the seed.", show_default=False),
    ] = None,
    attribute: Annotated[
        str, typer.Option(help="birth_date, birth_city, university, major, employer or work_city.")
    ] = "university",
    out: Annotated[Path, typer.Option(help="The figure: .html, or .png, .svg, .pdf with a browser.")] = Path(
        "runs/attention.html"
    ),
    data: Data = None,
    top: Annotated[int, typer.Option(help="Output tokens to name.", min=1)] = 8,
    dtype: Dtype = "float32",
    device: Device = None,
    seed: Seed = 0,
) -> None:
    """Draw what one head attends to in a biography and in the question of one person."""
    from circuits.datasets.wordings import ATTRIBUTES
    from circuits.storage import check_ending

    check_ending(out, (".html", ".png", ".svg", ".pdf"), "figure")
    _check_names([head])
    if attribute not in ATTRIBUTES:
        raise CircuitsError(f"there is no attribute {attribute!r}: choose from {', '.join(ATTRIBUTES)}")
    dataset = _dataset(data, model)
    people = dataset.people().set_index("person")
    if person is None:
        person = int(people[people["split"] == "qa_ood"].sample(1, random_state=seed).index[0])
    if person not in people.index:
        raise CircuitsError(f"there is no person {person}: the dataset has people 0 to {len(people) - 1}")
    loaded = _load(model, dtype, device)
    from circuits.datasets import Task
    from circuits.figures import attention_figure, save_figure
    from circuits.interventions import pair_formats
    from circuits.models import shape_of
    from circuits.rankings import read_head
    from circuits.units import Head

    chosen = Head.parse(head, shape_of(loaded))
    split = str(people["split"][person])
    if loaded.tokenizer is None:
        raise CircuitsError(f"{model} has no tokenizer: save one beside its weights")
    questions = Task.from_dataset(dataset, split, loaded.tokenizer, [person])
    question = questions.select(questions.answers.index[questions.answers["attribute"] == attribute].tolist())
    biography = pair_formats(question, Task.from_dataset(dataset, "bio", loaded.tokenizer, [person]))
    readings = [
        read_head(loaded, chosen, biography, 0, "BIO", top),
        read_head(loaded, chosen, question, 0, "QA", top),
    ]
    kind = "QA-OOD" if split == "qa_ood" else "QA-ID"
    with _busy(f"drawing {out}"):
        save_figure(attention_figure(readings, subtitle=f"{model}, person {person} ({kind})"), out)
    _say(f"{out}: {chosen} on {people['name'][person]}, {attribute.replace('_', ' ')}")


@app.command()
def study(
    out: Annotated[Path, typer.Option(help="Folder for everything the study makes.")] = Path("runs/study"),
    family: Annotated[Family, typer.Option(help="Shape of the models.")] = Family.LLAMA,
    people: Annotated[int, typer.Option(help="Number of people.")] = 200,
    steps: Annotated[int, typer.Option(help="Optimizer steps of mixed training, and of each of two stages.")] = 1000,
    fraction: Annotated[float, typer.Option(help="k: top fraction of parameters in each influenced set.")] = 0.01,
    csv: Csv = False,
    seed: Seed = 0,
) -> None:
    """Run the paper's study end to end. Started again, it goes on where it was."""
    with _busy("starting"):
        import torch

        from circuits.datasets import DatasetSettings
        from circuits.study import StudySettings, run_study
        from circuits.training import Optimisation

    settings = StudySettings(
        family=family.value,
        seed=seed,
        data=DatasetSettings(people=people, seed=seed),
        optimisation=Optimisation(steps=steps),
        fraction=fraction,
    )
    # models this small are as fast on one thread, and two are many times slower when anything else runs; fading
    # weights would slow them down too
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    with _resumable():
        summary = run_study(out, settings, _say)
    if csv:
        import pandas

        for path in sorted((out / "tables").glob("*.parquet")):
            pandas.read_parquet(path).to_csv(path.with_suffix(".csv"), index=False)
    for arm in ("mixed", "two_stage", "two_stage_gentle"):
        scores = summary["accuracy"][arm]
        _say(f"{arm}: BIO {scores['bio']:.1%}, QA-ID {scores['qa_id']:.1%}, QA-OOD {scores['qa_ood']:.1%}")
    _say(f"{summary['seconds']['total']:.0f} s; read {out / 'report.html'}")
