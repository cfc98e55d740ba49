"""The commands. Each imports what it needs when it runs, so that ``--help`` is quick."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from circuits.cli.checkpoints import diff, info
from circuits.cli.inputs import check_folder, check_names, check_table, facts, heads_of, load, open_dataset, task_of
from circuits.cli.options import (
    Csv,
    Data,
    Device,
    Dtype,
    Examples,
    Family,
    GraftMethod,
    HeadMode,
    MaskMode,
    Model,
    Pre,
    Ranked,
    Recipe,
    Rest,
    Seed,
    Source,
    Split,
)
from circuits.cli.terminal import busy, cell, resumable, say, show
from circuits.errors import CircuitsError

if TYPE_CHECKING:
    from pandas import DataFrame

    from circuits.sweeps import SweepPlan

app = typer.Typer(
    name="circuits",
    help="Which parts of a model do two tasks share, and what happens without them?",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


app.command()(info)
app.command()(diff)


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


def _is_folder(path: Path) -> bool:
    """Whether a result goes into the folder of a sweep, and not into a file."""
    return not path.suffix


def _run_sweep(plan: "SweepPlan", out: Path, executor: str = "serial", workers: int | None = None) -> None:
    with busy("starting"):
        from circuits.sweeps import run_sweep
    with resumable():
        table = run_sweep(plan, out, executor, workers)
    show(_effects(table), f"{out / 'table.parquet'}: {len(table):,} rows, the largest effects first", 12)


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
    from circuits.facts import DatasetSettings, make_dataset

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
    with busy(f"making {people:,} people"):
        dataset = make_dataset(out, settings)
    say(f"{out}: {people:,} people, fingerprint {dataset.fingerprint}")
    say("answers: " + ", ".join(f"{split} {count:,}" for split, count in dataset.counts.items()))


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
    from circuits.facts import FactDataset

    dataset = FactDataset(data)
    with busy("starting"):
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
        with resumable():
            folders = train_recipe(chosen.value, dataset, out, start, optimisation, seed, progress=progress)
        for folder in folders:
            import pandas

            last = pandas.read_parquet(folder / "curve.parquet").iloc[-1]
            say(f"{folder}: BIO {last['bio']:.1%}, QA-ID {last['qa_id']:.1%}, QA-OOD {last['qa_ood']:.1%}")


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
        check_table(out)
    splits = split or list(Split)
    dataset = open_dataset(data, model, splits)
    loaded = load(model, dtype, device)
    import pandas

    from circuits.metrics import METRICS
    from circuits.metrics import evaluate as score
    from circuits.storage import write_table

    tables = []
    for chosen in splits:
        task = task_of(dataset, chosen.value, loaded, examples, seed)
        tables.append(score(loaded, task).assign(split=chosen.value))
    table = pandas.concat(tables, ignore_index=True)
    if out is not None:
        write_table(out, table, facts(loaded, dataset, seed, examples=examples), csv)
    means = table.groupby("split", sort=False)[list(METRICS)].mean().astype(float)
    show(means.assign(answers=table.groupby("split").size()).reset_index(), str(model))


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
    per: Annotated[str, typer.Option(help="Statistic of each example's gradient, or of each batch's.")] = "example",
    components: Annotated[
        list[str] | None,
        typer.Option(help="attention, mlp, embeddings or norms; may be repeated. Default: attention and mlp."),
    ] = None,
    checkpoint: Annotated[
        list[Path] | None,
        typer.Option(help="Earlier checkpoint of the same training, to add to the trace; may be repeated."),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Examples in one pass.", min=1)] = 32,
    dtype: Dtype = "float32",
    device: Device = None,
    csv: Csv = False,
    seed: Seed = 0,
) -> None:
    """Trace a task's gradients at every parameter of heads and neurons."""
    check_folder(out)
    splits = split or [Split.BIO, Split.QA_ID]
    dataset = open_dataset(data, model, splits)
    loaded = load(model, dtype, device)
    from circuits.storage import write_table
    from circuits.tracing import trace_checkpoints
    from circuits.units import Head, Neuron

    parts = components or ["attention", "mlp"]
    sources = [*(checkpoint or []), loaded]
    settings = {"examples": examples, "statistic": statistic, "loss": loss, "per": per, "components": parts}
    for chosen in splits:
        task = task_of(dataset, chosen.value, loaded, examples, seed)
        file = out / f"{chosen.value}.safetensors"
        traced = trace_checkpoints(sources, task, statistic, loss, batch_size, per, parts, file, dtype, device)
        about = facts(loaded, dataset, seed, **settings, checkpoints=[str(source) for source in checkpoint or []])
        for kind in (Head, Neuron):
            write_table(out / f"{chosen.value}_{kind.NOUN}s.parquet", traced.units(kind), about, csv)
        say(f"{file}: {traced!r}")


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
    check_folder(out)
    with busy("reading traces"):
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
    show(pandas.DataFrame({"": list(report), "value": [cell(value) for value in report.values()]}), str(mask))
    show(heads.sort_values("size", ascending=False), "Shared Size of heads", 10)


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
        check_table(out)
    check_names(head)
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
    dataset = open_dataset(data, model, splits)
    from circuits.storage import write_table

    if mask is not None:
        from circuits.masks import ParameterMask, ablate_mask, ablation_summary

        loaded_mask = ParameterMask.load(mask)
    loaded = load(model, dtype, device)
    if mask is not None:
        loaded_mask.check(loaded)
        before = None if pre is None else load(pre, dtype, device)
        tasks = [task_of(dataset, chosen.value, loaded, examples, seed) for chosen in splits]
        table = ablate_mask(loaded, loaded_mask, tasks, before, mask_mode.value, draws, seed)
        settings: dict[str, Any] = {"mask": loaded_mask.provenance, "mode": mask_mode.value, "draws": draws}
        shown = ablation_summary(table).rename(columns=lambda name: name.replace("_", " "))
    else:
        from circuits.sweeps import sweep_heads

        heads = heads_of(head, loaded)
        tasks = [task_of(dataset, chosen.value, loaded, examples, seed) for chosen in splits]
        table = sweep_heads(loaded, tasks, modes, heads=heads)
        settings = {"heads": head, "modes": modes}
        columns = ["head", "mode", "task", "exact_match_effect", "log_prob_effect"]
        shown = table.sort_values("log_prob_effect")[columns]
    write_table(out, table, facts(loaded, dataset, seed, examples=examples, **settings), csv)
    show(shown, f"{out}")


@app.command("graft")
def find_graft(
    model: Model,
    pre: Pre,
    data: Data = None,
    by: Annotated[
        GraftMethod, typer.Option(help="Rank parameters by a score, or optimise a mask.")
    ] = GraftMethod.OPTIMISATION,
    keep: Annotated[float, typer.Option(help="Share of the fine-tuned accuracy to keep.")] = 0.95,
    split: Annotated[Split, typer.Option(help="The task whose accuracy is kept.")] = Split.QA_ID,
    out: Annotated[Path, typer.Option(help="Folder for mask.safetensors, curve.parquet and the grafted model.")] = Path(
        "runs/graft"
    ),
    save: Annotated[bool, typer.Option("--model/--no-model", help="Save the grafted checkpoint in model/.")] = True,
    examples: Examples = None,
    dtype: Dtype = "float32",
    device: Device = None,
    csv: Csv = False,
    seed: Seed = 0,
) -> None:
    """Find the fewest fine-tuned parameters that keep a task, and save the grafted model."""
    check_folder(out)
    if not 0 < keep <= 1:
        raise CircuitsError(f"the share to keep is {keep}: it must be more than 0 and at most 1")
    dataset = open_dataset(data, model, [split])
    fine_tuned, before = load(model, dtype, device), load(pre, dtype, device)
    import os

    from circuits.masks import graft, graft_by_optimisation, graft_by_score
    from circuits.models import save_model

    task = task_of(dataset, split.value, fine_tuned, examples, seed)
    if by is GraftMethod.OPTIMISATION:
        found = graft_by_optimisation(before, fine_tuned, task, keep, seed=seed)
    else:
        found = graft_by_score(before, fine_tuned, task, by.value, keep)
    found.save(out)
    if csv:
        found.curve.to_csv(out / "curve.csv", index=False)
    if save:
        # where the dataset is, so that other commands find it as they do for a trained checkpoint
        place = {"dataset": dataset.fingerprint, "data": os.path.relpath(dataset.folder, out / "model")}
        with graft(before, found.mask, fine_tuned):
            save_model(before, out / "model", {**place, "graft": found.mask.provenance})
    show(found.curve, f"{out}: {found!r}", len(found.curve))


@app.command()
def rank(
    model: Model,
    pre: Pre,
    data: Data = None,
    traces: Annotated[
        Path | None,
        typer.Option(
            help="Folder of 'circuits trace', with bio and qa_id; for rankings by traces.", show_default=False
        ),
    ] = None,
    mask: Annotated[
        Path | None, typer.Option(help="Shared parameters; for the ranking by Shared Size.", show_default=False)
    ] = None,
    graft: Annotated[
        Path | None, typer.Option(help="Mask of a graft; for the ranking by graft size.", show_default=False)
    ] = None,
    units: Annotated[Ranked, typer.Option(help="What to rank.")] = Ranked.HEADS,
    metric: Annotated[
        list[str] | None,
        typer.Option(help="A ranking; may be repeated. Default: all that the files given allow."),
    ] = None,
    mode: Annotated[
        MaskMode,
        typer.Option(
            help="What the top units become in the critical curve. Heads that change their weights bring the keys and "
            "values of their key/value groups along; the curves' column groups says how many."
        ),
    ] = MaskMode.REVERT,
    rest: Annotated[
        Rest,
        typer.Option(
            help="Where all else comes from in the sufficient curve. A model trained from scratch can do nothing with "
            "the embeddings it had before; for a pretrained one take pre."
        ),
    ] = Rest.FINE_TUNED,
    split: Annotated[list[Split] | None, typer.Option(help="What to score; default: qa_id and qa_ood.")] = None,
    draws: Annotated[int, typer.Option(help="Rankings at random.", min=1)] = 5,
    out: Annotated[Path, typer.Option(help="Folder for the tables and figures.")] = Path("runs/rankings"),
    examples: Examples = None,
    dtype: Dtype = "float32",
    device: Device = None,
    csv: Csv = False,
    seed: Seed = 0,
) -> None:
    """Rank heads or neurons by Shared Size and its rivals: are the top ones enough, and are they needed?"""
    check_folder(out)
    splits = [one.value for one in split or [Split.QA_ID, Split.QA_OOD]]
    dataset = open_dataset(data, model, splits)
    with busy("reading"):
        import pandas

        from circuits.figures import agreement_figure, ranking_curves_figure, save_figure
        from circuits.masks import ParameterMask
        from circuits.rankings import (
            RANKINGS,
            Evidence,
            agreement,
            critical_curve,
            curve_summary,
            rank_units,
            sufficient_curve,
        )
        from circuits.storage import write_table
        from circuits.tracing import GradientTrace
        from circuits.units import Head, Neuron

        kind = Head if units is Ranked.HEADS else Neuron
        given = {"shared_size": mask, "graft_size": graft}
        given |= dict.fromkeys(("bio_trace", "qa_trace", "gradient_x_activation"), traces)
        # ablating every neuron alone takes long: only when asked for
        possible = [name for name in RANKINGS if given.get(name, name) and (kind is Head or name != "ablation")]
        chosen = metric or possible
        files = {} if traces is None else {"bio": "bio", "qa": "qa_id"}
        read = {name: GradientTrace.load(f"{traces}/{file}.safetensors") for name, file in files.items()}
        shared, grafted = (None if path is None else ParameterMask.load(path) for path in (mask, graft))
    fine_tuned, before = load(model, dtype, device), load(pre, dtype, device)
    tasks = [task_of(dataset, one, fine_tuned, examples, seed) for one in splits]
    ranking = rank_units(Evidence(fine_tuned, before, read, shared, grafted, tasks[0], seed), kind, chosen, draws)
    curves = {
        "sufficient": sufficient_curve(ranking, before, fine_tuned, tasks, rest=rest.value),
        "critical": critical_curve(ranking, fine_tuned, tasks, before, mode.value),
    }
    if not curves["sufficient"]["fine_tuned"].any():
        raise CircuitsError(
            f"{model} answers nothing of {', '.join(splits)}: no unit of it can be enough or needed; "
            "are it and --pre in each other's place?"
        )
    agreed = agreement(ranking)
    tables = {
        "ranking": ranking,
        "curves": pandas.concat(curves.values(), ignore_index=True),
        "summary": pandas.concat([curve_summary(curve) for curve in curves.values()], ignore_index=True),
        "agreement": agreed.rename_axis("metric").reset_index(),
    }
    about = facts(
        fine_tuned,
        dataset,
        seed,
        pre=facts(before, dataset, seed)["model"],
        mask=None if shared is None else shared.provenance,
        graft=None if grafted is None else grafted.provenance,
        traces={name: trace.provenance for name, trace in read.items()},
        mode=mode.value,
        rest=rest.value,
        examples=examples,
        draws=draws,
    )
    for name, table in tables.items():
        write_table(out / f"{name}.parquet", table, about, csv)
    for name, curve in curves.items():
        save_figure(ranking_curves_figure(curve, units=units.value), out / f"{name}.html", "beside")
    save_figure(agreement_figure(agreed, units.value), out / "agreement.html", "beside")
    titles = {"sufficient": "only the top n are trained: areas, and the smallest n that is enough"}
    for condition, rows in tables["summary"].groupby("condition", sort=False):
        title = titles.get(str(condition), f"the top n: {condition}; areas, and the smallest n that breaks the model")
        show(rows.drop(columns=["condition", "draws"]).dropna(axis="columns", how="all"), f"{out}\n{title}", 40)
    if metric is None and len(chosen) < len(RANKINGS):
        say(f"left out: {', '.join(name for name in RANKINGS if name not in chosen)}")


@app.command()
def patch(
    model: Model,
    data: Data = None,
    source: Annotated[
        Source,
        typer.Option(
            "--from", help="formats: the same person's biography. people: another person's run of the same question."
        ),
    ] = Source.PEOPLE,
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
    if split is Split.BIO:
        raise CircuitsError("patch changes the run of a question, but bio has none: choose qa_id or qa_ood")
    if not _is_folder(out):
        check_table(out)
    check_names(head)
    if _is_folder(out):
        from circuits.sweeps import SweepPlan

        plan = SweepPlan(
            model,
            dataset=data,
            tasks=split.value,
            examples=examples,
            units=head or "heads",
            modes="patch",
            source=source.value,
            seed=seed,
            dtype=dtype,
            device=device,
        )
        _run_sweep(plan, out)
        return
    dataset = open_dataset(data, model, [split])
    loaded = load(model, dtype, device)
    from circuits.interventions import pair_formats, pair_people
    from circuits.storage import write_table
    from circuits.sweeps import sweep_patches

    heads = heads_of(head, loaded)
    target = task_of(dataset, split.value, loaded, examples, seed)
    if source is Source.FORMATS:
        other = pair_formats(target, task_of(dataset, "bio", loaded, None, seed))
    else:
        other = pair_people(target, seed, task_of(dataset, split.value, loaded, None, seed))
    table = sweep_patches(loaded, other, target, source.value, heads)
    settings = {"source": source.value, "split": split.value, "examples": examples, "heads": head}
    write_table(out, table, facts(loaded, dataset, seed, **settings), csv)
    columns = ["head", "exact_match_effect", "log_prob_effect", "source_exact_match"]
    shown = table.sort_values("log_prob_effect")[[column for column in columns if column in table]]
    show(shown, f"{out}: source_exact_match is how often the other run's answer is given")


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
        int | None,
        typer.Option(
            help="Number of processes; default: as many as the cores have room for.", min=1, show_default=False
        ),
    ] = None,
) -> None:
    """Run a sweep, or what is missing of one. Several of this command may share one folder."""
    with busy(f"reading {plan}"):
        from circuits.sweeps import SweepPlan

        read = SweepPlan.read(plan)
    _run_sweep(read, out, executor, workers)


@sweep.command("show")
def show_sweep(
    out: Annotated[Path, typer.Argument(help="Folder of a sweep.", show_default=False)],
    most: Annotated[int, typer.Option(help="Rows to show.", min=0)] = 12,
) -> None:
    """Tell how far a sweep is, what it does, and the largest effects so far."""
    with busy(f"reading {out}"):
        import pandas

        from circuits.sweeps import sweep_state

        state = sweep_state(out)
    say(f"{out}: {state.done} of {state.jobs} jobs finished, {len(state.table):,} of {state.interventions:,} rows")
    unused = () if state.plan.screen else ("verify",)
    settings = {name: value for name, value in vars(state.plan).items() if value is not None and name not in unused}
    settings |= {f"{name} (content)": state.facts.get(name) for name in ("model", "dataset")}
    settings |= {name: state.facts.get(name) for name in ("device", "arithmetic")}
    shown = [", ".join(value) if isinstance(value, tuple) else str(value) for value in settings.values()]
    show(pandas.DataFrame({"setting": list(settings), "value": shown}), "", len(settings))
    if len(state.table):
        show(_effects(state.table), "largest effects", most)


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
    from circuits.facts.wordings import ATTRIBUTES
    from circuits.storage import check_ending

    check_ending(out, (".html", ".png", ".svg", ".pdf"), "figure")
    check_names([head])
    if attribute not in ATTRIBUTES:
        raise CircuitsError(f"there is no attribute {attribute!r}: choose from {', '.join(ATTRIBUTES)}")
    dataset = open_dataset(data, model, [])
    people = dataset.people().set_index("person")
    if person is None:
        person = int(people[people["split"] == "qa_ood"].sample(1, random_state=seed).index[0])
    if person not in people.index:
        raise CircuitsError(f"there is no person {person}: the dataset has people 0 to {len(people) - 1}")
    from circuits.facts import check_held_out

    split = str(people["split"][person])
    check_held_out(model, dataset, [split], people=[person])
    loaded = load(model, dtype, device)
    from circuits.figures import attention_figure, save_figure
    from circuits.interventions import pair_formats
    from circuits.models import shape_of
    from circuits.rankings import read_head
    from circuits.units import Head

    chosen = Head.parse(head, shape_of(loaded))
    if loaded.tokenizer is None:
        raise CircuitsError(f"{model} has no tokenizer: save one beside its weights")
    questions = dataset.task(split, loaded.tokenizer, [person])
    question = questions.select(questions.answers.index[questions.answers["attribute"] == attribute].tolist())
    biography = pair_formats(question, dataset.task("bio", loaded.tokenizer, [person]))
    readings = [
        read_head(loaded, chosen, biography, 0, "BIO", top),
        read_head(loaded, chosen, question, 0, "QA", top),
    ]
    kind = "QA-OOD" if split == "qa_ood" else "QA-ID"
    with busy(f"drawing {out}"):
        save_figure(attention_figure(readings, subtitle=f"{model}, person {person} ({kind})"), out)
    say(f"{out}: {chosen} on {people['name'][person]}, {attribute.replace('_', ' ')}")


@app.command()
def study(
    out: Annotated[Path, typer.Option(help="Folder for everything the study makes.")] = Path("runs/study"),
    model: Annotated[
        Path | None,
        typer.Option(
            help="Folder of a pretrained checkpoint to start from; default: a new small model.", show_default=False
        ),
    ] = None,
    family: Annotated[
        Family | None,
        typer.Option(help="Shape of the models; default: llama, or the checkpoint's.", show_default=False),
    ] = None,
    people: Annotated[
        int | None, typer.Option(help="Number of people; default: 200, with --model 120.", show_default=False)
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(
            help="Optimizer steps of mixed training, and of each of two stages; default: 1000, with --model 150.",
            show_default=False,
        ),
    ] = None,
    fraction: Annotated[float, typer.Option(help="k: top fraction of parameters in each influenced set.")] = 0.01,
    rank_examples: Annotated[
        int | None,
        typer.Option(
            help="Examples at each point of a ranking's curves; default: 50, with --model 60.",
            min=1,
            show_default=False,
        ),
    ] = None,
    draws: Annotated[int, typer.Option(help="Random masks, permutations and rankings.", min=2)] = 5,
    seed: Annotated[int | None, typer.Option(help="Seed of every random draw; default: 0.", show_default=False)] = None,
    seeds: Annotated[
        str | None,
        typer.Option(help="Several seeds, such as 0,1,2: a study in OUT/seed-0 …, and a summary.", show_default=False),
    ] = None,
    csv: Csv = False,
) -> None:
    """Run the paper's study end to end, for one seed or several. Started again, it goes on where it was."""
    if seed is not None and seeds is not None:
        raise CircuitsError("--seed and --seeds were given: one study has one seed, several have seeds")
    several = None if seeds is None else _numbers(seeds)
    with busy("starting"):
        import torch

        from circuits.study import PRETRAINED_STUDY, StudySettings, run_studies, run_study

    first = seed or 0
    usual = StudySettings() if model is None else PRETRAINED_STUDY
    settings = replace(
        usual,
        family=None if family is None else family.value,
        model=None if model is None else str(model),
        seed=first,
        data=replace(usual.data, people=usual.data.people if people is None else people, seed=first),
        optimisation=replace(usual.optimisation, steps=usual.optimisation.steps if steps is None else steps),
        fraction=fraction,
        rank_examples=usual.rank_examples if rank_examples is None else rank_examples,
        draws=draws,
    )
    # models this small are as fast on one thread, and two are many times slower when anything else runs; fading
    # weights would slow them down too
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    with resumable():
        summary = run_study(out, settings, say) if several is None else run_studies(out, several, settings, say)
    if csv:
        import pandas

        for path in sorted(out.glob("tables/*.parquet" if several is None else "seed-*/tables/*.parquet")):
            pandas.read_parquet(path).to_csv(path.with_suffix(".csv"), index=False)
    for arm in ("mixed", "two_stage", "two_stage_gentle"):
        scores = {name: score if several is None else score["mean"] for name, score in summary["accuracy"][arm].items()}
        say(f"{arm}: BIO {scores['bio']:.1%}, QA-ID {scores['qa_id']:.1%}, QA-OOD {scores['qa_ood']:.1%}")
    total = summary["seconds"]["total"]
    spent = total if several is None else sum(total["values"])
    say(f"{spent:.0f} s; read {out / 'report.html'}")


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="Folder of a study of one seed.", show_default=False)],
    out: Annotated[Path, typer.Option(help="The page, a Markdown file; images go into figures beside it.")] = Path(
        "results.md"
    ),
) -> None:
    """Write what a study has found of each claim of the paper, as Markdown with images."""
    with busy("drawing"):
        from circuits.study import report_study

        written = report_study(folder, out)
    say(f"{written[-1]}, {len(written) - 1} images")


def _numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise CircuitsError(f"--seeds is {text!r}: write whole numbers with commas, as in 0,1,2") from None
