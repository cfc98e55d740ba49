"""``circuits ablate``: what happens without a mask's parameters, or without a head."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from circuits.cli.inputs import (
    check_heads,
    check_sweep,
    check_table,
    facts,
    heads_of,
    is_folder,
    load,
    open_tasks,
    planned_heads,
)
from circuits.cli.options import (
    Chat,
    Csv,
    Data,
    Device,
    DropBad,
    Dtype,
    Examples,
    HeadMode,
    MaskMode,
    Model,
    Seed,
    Top,
    task_option,
)
from circuits.cli.sweep import run_into
from circuits.cli.terminal import effects, say_csv, show, with_intervals
from circuits.errors import CircuitsError
from circuits.progress import counted

if TYPE_CHECKING:
    from pandas import DataFrame


def ablate(
    model: Model,
    data: Data = None,
    mask: Annotated[
        Path | None,
        typer.Option(
            help="Ablate this parameter mask, or with --top its heads, each alone; without it, every head.",
            show_default=False,
        ),
    ] = None,
    top: Top = None,
    pre: Annotated[
        Path | None, typer.Option(help="Checkpoint before fine-tuning, to revert a mask to.", show_default=False)
    ] = None,
    mask_mode: Annotated[MaskMode, typer.Option(help="What masked parameters become.")] = MaskMode.REVERT,
    span: Annotated[
        str | None,
        typer.Option(
            help="Ablate the mask at the tokens of this span alone, such as subject or last; default: at all.",
            show_default=False,
        ),
    ] = None,
    draws: Annotated[int, typer.Option(help="Random masks to compare with.", min=1)] = 5,
    head: Annotated[
        list[str] | None,
        typer.Option(help="A head to ablate alone, such as L2H1; may be repeated. Default: every head."),
    ] = None,
    mode: Annotated[
        list[HeadMode] | None,
        typer.Option(help="What heads put out; default: zero and mean (over the first task)."),
    ] = None,
    task: Annotated[
        list[str] | None, task_option("What to score", "May be repeated; default: bio, qa_id and qa_ood.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Parquet file, or for heads a folder: a sweep that goes on when it is interrupted. "
            "Default: runs/mask_ablation.parquet or runs/head_ablation.parquet.",
            show_default=False,
        ),
    ] = None,
    examples: Examples = None,
    chat: Chat = False,
    drop_bad: DropBad = False,
    dtype: Dtype = "float32",
    device: Device = None,
    csv: Csv = False,
    seed: Seed = 0,
) -> None:
    """Ablate a parameter mask (--mask), or each head alone: every one, or the --top heads of a mask."""
    whole = mask is not None and top is None
    out = out or Path(f"runs/{'mask' if whole else 'head'}_ablation.parquet")
    if whole or not is_folder(out):
        check_table(out)
    if whole and (head or mode):
        raise CircuitsError("a mask and heads were given: ablate one kind at a time")
    if not whole and (pre is not None or mask_mode is not MaskMode.REVERT or span is not None):
        raise CircuitsError(
            "--pre, --mask-mode and --span are for a mask that is ablated whole: name its file with --mask, "
            "without --top"
        )
    if not whole:
        check_heads(head, mask, top)
    if whole and mask_mode is MaskMode.REVERT and pre is None:
        raise CircuitsError("reverting a mask needs the model before fine-tuning: name its folder with --pre")
    names = task or ["bio", "qa_id", "qa_ood"]
    modes = [chosen.value for chosen in mode or [HeadMode.ZERO, HeadMode.MEAN]]
    if is_folder(out):
        check_sweep(chat, drop_bad)
        from circuits.sweeps import SweepPlan

        plan = SweepPlan(
            model,
            dataset=data,
            tasks=names,
            examples=examples,
            units=planned_heads(head, mask, top),
            modes=modes,
            seed=seed,
            dtype=dtype,
            device=device,
        )
        run_into(plan, out)
        return
    opened = open_tasks(model, names, data, examples=examples, seed=seed, chat=chat, drop_bad=drop_bad)
    from circuits.storage import write_table

    if whole:
        from circuits.masks import ParameterMask, ablate_mask, ablation_means, ablation_summary

        for one in opened.tasks:
            one.span(span or "all")  # refuses a span that is not there
        loaded_mask = ParameterMask.load(str(mask))
    loaded = load(model, dtype, device)
    if whole:
        loaded_mask.check(loaded)
        before = None if pre is None else load(pre, dtype, device)
        at = span or "all"
        answers = ablate_mask(
            loaded,
            loaded_mask,
            opened.tasks,
            pre=before,
            mode=mask_mode.value,
            draws=draws,
            seed=seed,
            span=at,
            per_answer=True,
        )
        table, summary = ablation_means(answers), ablation_summary(answers)
        settings: dict[str, Any] = {"mask": loaded_mask.provenance, "mode": mask_mode.value, "span": at, "draws": draws}
        shown = _by_condition(summary)
    else:
        from circuits.sweeps import sweep_heads

        heads = heads_of(head, loaded, mask, top)
        table = sweep_heads(loaded, opened.tasks, modes, heads=heads)
        settings = {"heads": None if heads is None else list(map(str, heads)), "modes": modes}
        shown = effects(table, ["unit", "mode", "task"], "log_prob_effect")
    about = facts(loaded, opened, seed, examples=examples, **settings)
    write_table(out, table, about, csv)
    if whole:
        summary_file = out.with_stem(f"{out.stem}_summary")
        write_table(summary_file, summary, about, csv)
        title = f"{summary_file}: {mask_mode.value} {loaded_mask.size:,} of {loaded_mask.total:,} parameters, at {at}"
    else:
        title = f"{out}: {len(table):,} rows"
    show(shown, title)
    say_csv(csv, out, *([summary_file] if whole else []))


def _by_condition(summary: "DataFrame") -> "DataFrame":
    """One row for each task and what was masked."""
    import pandas

    rows = []
    for one in summary.to_dict("records"):
        thinned = one["thinned_parameters"] < one["parameters"]
        draws = counted(one["draws"], "draw")
        whole = ("the mask", one["parameters"], "drop")
        random = (f"random, {draws}", one["thinned_parameters"], "random_drop")
        conditions = [whole, *([("thinned", one["thinned_parameters"], "thinned_drop")] if thinned else []), random]
        rows.append({"task": one["task"], "masked": "nothing", "parameters": 0, "exact_match": one["before"]})
        rows += [
            {
                "task": one["task"],
                "masked": masked,
                "parameters": parameters,
                "exact_match": one["before"] - one[drop],
                "drop": one[drop],
                **{f"drop_{end}": one.get(f"{drop}_{end}", math.nan) for end in ("low", "high")},
            }
            for masked, parameters, drop in conditions
        ]
        name = "thinned − random" if thinned else "mask − random"
        ends = {f"drop{end}": one[f"excess{end}"] for end in ("", "_low", "_high", "_p")}
        rows.append({"task": one["task"], "masked": name, **ends})
    table = pandas.DataFrame(rows).astype({"parameters": "Int64"})
    return with_intervals(table)
