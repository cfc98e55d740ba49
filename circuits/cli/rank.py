"""``circuits rank``: which heads or neurons matter most."""

from pathlib import Path
from typing import Annotated

import typer

from circuits.cli.inputs import check_folder, facts, load, open_tasks
from circuits.cli.options import (
    Chat,
    Csv,
    Data,
    Device,
    DropBad,
    Dtype,
    Examples,
    MaskMode,
    Model,
    Pre,
    Ranked,
    Rest,
    Seed,
    task_option,
)
from circuits.cli.terminal import busy, say, say_csv, show, with_intervals
from circuits.errors import CircuitsError


def rank(
    model: Model,
    pre: Pre,
    data: Data = None,
    traces: Annotated[
        Path | None,
        typer.Option(
            help="Folder of 'circuits trace': each trace NAME in it is a ranking NAME_trace, and the last by name "
            "gives gradient_x_activation.",
            show_default=False,
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
    task: Annotated[
        list[str] | None, task_option("What to score", "May be repeated; default: qa_id and qa_ood.")
    ] = None,
    draws: Annotated[int, typer.Option(help="Rankings at random.", min=1)] = 5,
    out: Annotated[Path, typer.Option(help="Folder for the tables and figures.")] = Path("runs/rankings"),
    examples: Examples = None,
    chat: Chat = False,
    drop_bad: DropBad = False,
    dtype: Dtype = "float32",
    device: Device = None,
    csv: Csv = False,
    seed: Seed = 0,
) -> None:
    """Rank heads or neurons by Shared Size and its rivals: are the top ones enough, and are they needed?"""
    check_folder(out)
    if traces is not None:
        check_folder(traces)
    names = task or ["qa_id", "qa_ood"]
    opened = open_tasks(model, names, data, examples=examples, seed=seed, chat=chat, drop_bad=drop_bad)
    with busy("reading"):
        import pandas

        from circuits.figures import agreement_figure, ranking_curves_figure, save_figure
        from circuits.masks import ParameterMask
        from circuits.models import facts_of
        from circuits.rankings import (
            Evidence,
            agreement,
            critical_curve,
            curve_summary,
            rank_units,
            rankings_of,
            sufficient_curve,
        )
        from circuits.storage import write_table
        from circuits.tracing import GradientTrace
        from circuits.units import Head, Neuron

        kind = Head if units is Ranked.HEADS else Neuron
        read = {} if traces is None else {file.stem: GradientTrace.load(file) for file in trace_files(traces)}
        shared, grafted = (None if path is None else ParameterMask.load(path) for path in (mask, graft))
    fine_tuned, before = load(model, dtype, device), load(pre, dtype, device)
    tasks = opened.tasks
    evidence = Evidence(fine_tuned, before, read, shared, grafted, tasks[0], seed)
    given = {"shared_size": mask, "graft_size": graft, "gradient_x_activation": traces}
    known = list(rankings_of(evidence))
    # ablating every neuron alone takes long: only when asked for
    possible = [name for name in known if given.get(name, name) and (kind is Head or name != "ablation")]
    chosen = metric or possible
    ranking = rank_units(evidence, kind, chosen, draws=draws)
    curves = {
        "sufficient": sufficient_curve(ranking, before, fine_tuned, tasks=tasks, rest=rest.value),
        "critical": critical_curve(ranking, fine_tuned, tasks, pre=before, mode=mode.value),
    }
    if not curves["sufficient"]["fine_tuned"].any():
        raise CircuitsError(
            f"{model} answers nothing of {', '.join(one.name for one in tasks)}: no unit of it can be enough or "
            "needed; are it and --pre in each other's place?"
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
        opened,
        seed,
        pre=facts_of(before)["model"],
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
    becomes = {"revert": "reverted", "zero": "zero", "mean": "at their mean"}
    titles = {"sufficient": "only the top n trained: area under the curve, and n95, the smallest n that is enough"}
    for condition, rows in tables["summary"].groupby("condition", sort=False):
        changed = becomes.get(str(condition), condition)
        broken = f"the top n {changed}: area under the curve, and n50, the smallest n that breaks the model"
        told = with_intervals(rows.drop(columns=["condition", "draws"]).dropna(axis="columns", how="all"))
        show(told, f"{out}: {titles.get(str(condition), broken)}", 40)
    if metric is None and len(chosen) < len(known):
        needed = {"shared_size": "give --mask", "graft_size": "give --graft", "gradient_x_activation": "give --traces"}
        needed["ablation"] = "it is slow for neurons: ask for it with --metric ablation"
        say(f"left out: {', '.join(f'{name} ({needed[name]})' for name in known if name not in chosen)}")
    say_csv(csv, *(out / f"{name}.parquet" for name in tables))


def trace_files(folder: Path) -> list[Path]:
    """The trace files of a folder, by name."""
    if not (files := sorted(folder.glob("*.safetensors"))):
        raise CircuitsError(f"there is no trace in {folder}: make some with 'circuits trace --out {folder}'")
    return files
