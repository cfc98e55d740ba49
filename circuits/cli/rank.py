"""``circuits rank``: which heads or neurons matter most."""

from pathlib import Path
from typing import Annotated

import typer

from circuits.cli.inputs import check_folder, facts, load, open_dataset, task_of
from circuits.cli.options import Csv, Data, Device, Dtype, Examples, MaskMode, Model, Pre, Ranked, Rest, Seed, Split
from circuits.cli.terminal import busy, say, show
from circuits.errors import CircuitsError


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
