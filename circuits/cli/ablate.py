"""``circuits ablate``: what happens without a mask's parameters, or without a head."""

from pathlib import Path
from typing import Annotated, Any

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
from circuits.cli.terminal import show
from circuits.errors import CircuitsError


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
        from circuits.masks import ParameterMask, ablate_mask, ablation_summary

        for one in opened.tasks:
            one.span(span or "all")  # refuses a span that is not there
        loaded_mask = ParameterMask.load(str(mask))
    loaded = load(model, dtype, device)
    if whole:
        loaded_mask.check(loaded)
        before = None if pre is None else load(pre, dtype, device)
        at = span or "all"
        table = ablate_mask(loaded, loaded_mask, opened.tasks, before, mask_mode.value, draws, seed, span=at)
        settings: dict[str, Any] = {"mask": loaded_mask.provenance, "mode": mask_mode.value, "span": at, "draws": draws}
        told = f": {mask_mode.value}, at the tokens of {at}"
        # the same in all rows
        shown = ablation_summary(table).drop(columns=["mode", "span"])
        shown = shown.rename(columns=lambda name: name.replace("_", " "))
    else:
        from circuits.sweeps import sweep_heads

        heads = heads_of(head, loaded, mask, top)
        table = sweep_heads(loaded, opened.tasks, modes, heads=heads)
        settings = {"heads": None if heads is None else list(map(str, heads)), "modes": modes}
        columns = ["unit", "mode", "task", "exact_match_effect", "log_prob_effect"]
        shown = table.sort_values("log_prob_effect")[columns]
        told = ""
    write_table(out, table, facts(loaded, opened, seed, examples=examples, **settings), csv)
    show(shown, f"{out}{told}")
