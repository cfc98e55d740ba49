"""How often intervals hold the true mean, and how often tests find what is not there; ``runs/bench/coverage.json``.

Run with ``python -m benchmarks.coverage [CHECKPOINT]``. Each row of the table is one kind of value, drawn many times:

- share: exact match of one model.
- difference: exact match of one model less another's: −1, 0 or 1.
- effect: log-probability with an intervention less that without. ``gamma`` and ``lognormal`` have one long tail,
  ``few`` is near 0 for four answers of five, ``long`` (Student's t with 3 degrees of freedom) has two long tails.
- real: effects on the questions of 100 people of zeroing each head, of a checkpoint made by ``circuits train`` if one
  is given; people are drawn from these 100 with replacement, and their mean is the true one.

In the rows of people, 3 to 6 answers belong to each and have an intra-class correlation of 0.3. ``percentile`` is the
bootstrap percentile interval over answers, which stood here before.
"""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy
import pandas

from circuits.metrics import NAMED_METRICS, effect_kind
from circuits.statistics import Kind, intervals, paired_p_values
from circuits.storage import provenance, write_json

ICC = 0.3
TIMES = 2_000

Draw = Callable[[numpy.random.Generator, int, numpy.ndarray], numpy.ndarray]


def shares(*chances: float) -> Draw:
    """Values 1, −1 and 0 with these chances (and the rest); within a person Dirichlet-multinomial."""

    def draw(generator: numpy.random.Generator, times: int, people: numpy.ndarray) -> numpy.ndarray:
        full = numpy.array([*chances, 1 - sum(chances)])
        if people.max() + 1 == len(people):
            own = numpy.broadcast_to(full, (times, len(people), len(full)))
        else:
            parts = generator.gamma(full * (1 - ICC) / ICC, size=(times, people.max() + 1, len(full))) + 1e-300
            own = (parts / parts.sum(-1, keepdims=True))[:, people]
        kind = (generator.random((times, len(people), 1)) > own.cumsum(-1)[..., :-1]).sum(-1)
        return numpy.array([1, -1, 0] if len(chances) == 2 else [1, 0])[kind]

    return draw


def correlated(generator: numpy.random.Generator, times: int, people: numpy.ndarray) -> numpy.ndarray:
    """Standard normal values, correlated within a person."""
    alone = generator.standard_normal((times, len(people)))
    if people.max() + 1 == len(people):
        return alone
    shared = generator.standard_normal((times, people.max() + 1))[:, people]
    return ICC**0.5 * shared + (1 - ICC) ** 0.5 * alone


def through(quantile: Callable[[numpy.ndarray], numpy.ndarray]) -> Draw:
    """Values of any distribution, by its quantiles."""
    from scipy import stats

    grid = numpy.linspace(-6, 6, 10_001)
    known = quantile(stats.norm.cdf(grid))
    return lambda generator, times, people: numpy.interp(correlated(generator, times, people), grid, known)


def excess(accuracy: float, draws: int = 5) -> Draw:
    """The accuracy of an answer over several random masks, less that under one mask that costs as much."""
    from scipy import stats

    # answers differ in how easily they are lost
    own = through(lambda chance: stats.beta.ppf(chance, 8 * accuracy, 8 * (1 - accuracy)))

    def draw(generator: numpy.random.Generator, times: int, people: numpy.ndarray) -> numpy.ndarray:
        kept = own(generator, times, people).clip(0, 1)
        return generator.binomial(draws, kept) / draws - generator.binomial(1, kept)

    return draw


def effects() -> dict[str, tuple[Draw, float]]:
    """Kinds of effects, each with its true mean."""
    from scipy import stats

    def few(chance: numpy.ndarray) -> numpy.ndarray:
        tail = stats.gamma.ppf(((chance - 0.8) / 0.2).clip(1e-9), 2, scale=2)
        return -numpy.where(chance > 0.8, tail, stats.norm.ppf((chance / 0.8).clip(1e-9, 1 - 1e-9), scale=0.2))

    return {
        "gamma": (through(lambda chance: -stats.gamma.ppf(chance, 0.8)), -0.8),
        "lognormal": (through(lambda chance: -stats.lognorm.ppf(chance, 0.8)), -float(numpy.exp(0.32))),
        "few": (through(few), -0.8),
        "long": (through(lambda chance: stats.t.ppf(chance, 3)), 0.0),
    }


def cases() -> Iterator[tuple[str, str, Draw, float]]:
    """What is drawn, its kind, and the true mean."""
    for chance in (0.05, 0.3, 0.8, 0.97):
        yield "share", f"{chance:.0%}", shares(chance), chance
    for gained, lost in ((0.05, 0.05), (0.3, 0.3), (0.4, 0.05), (0.0, 0.2)):
        yield "difference", f"+{gained:.0%} −{lost:.0%}", shares(gained, lost), gained - lost
    for accuracy in (0.8, 0.97):
        yield "excess", f"{accuracy:.0%} of 5 draws", excess(accuracy), 0.0
    for name, (draw, mean) in effects().items():
        yield "effect", name, draw, mean


def people_of(count: int) -> numpy.ndarray:
    """Who each answer belongs to, 3 to 6 answers each."""
    return numpy.repeat(numpy.arange(count), numpy.resize([3, 4, 5, 6], count))


def percentile(values: numpy.ndarray, seed: int = 0) -> tuple[numpy.ndarray, numpy.ndarray]:
    """The bootstrap percentile interval over answers."""
    count = values.shape[1]
    weights = numpy.random.default_rng(seed).multinomial(count, numpy.full(count, 1 / count), size=1000).T / count
    low, high = numpy.quantile(values @ weights, [0.025, 0.975], axis=1)
    return low, high


#: What the values of each row are.
KINDS: dict[str, Kind] = {
    "share": "share",
    "difference": "binary_difference",
    "excess": "bounded_difference",
    "effect": "real",
}


def coverage(ends: tuple[numpy.ndarray, numpy.ndarray], mean: float) -> float:
    """How many of the intervals hold the mean."""
    return float(((ends[0] <= mean + 1e-9) & (mean <= ends[1] + 1e-9)).mean())


def measured(kind: str, draw: Draw, mean: float, people: numpy.ndarray, times: int, seed: int = 0) -> dict[str, Any]:
    """One row of the table."""
    values = draw(numpy.random.default_rng(seed), times, people)
    low, high = intervals(values, people, kind=KINDS[kind])
    return {
        "covered": coverage((low, high), mean),
        "percentile": coverage(percentile(values), mean),
        "width": float(numpy.median(high - low)),
    }


def null_rate(draw: Draw, people: numpy.ndarray, times: int, seed: int = 0, kind: Kind = "real") -> float:
    """How often two measurements of the same kind differ at the 5 % threshold."""
    generator = numpy.random.default_rng(seed)
    differences = draw(generator, times, people) - draw(generator, times, people)
    return float((paired_p_values(differences, people, kind=kind) < 0.05).mean())


def real_effects(checkpoint: str | None) -> pandas.DataFrame:
    """Effects of zeroing each head of the study's model, one row for each head and answer."""
    from benchmarks.place import study_model, study_task
    from circuits.facts import dataset_of
    from circuits.interventions import run_interventions, single
    from circuits.models import load_model, shape_of

    if checkpoint is None:
        model, task = study_model(), study_task()
    else:
        model = load_model(checkpoint)
        task = dataset_of(Path(checkpoint)).task("qa_ood", model.tokenizer)
    return run_interventions(model, task, single(shape_of(model).heads()), per_answer=True)


def real_rows(table: pandas.DataFrame, counts: tuple[int, ...], times: int = 300) -> Iterator[dict[str, Any]]:
    """Coverage of the means of real effects, people drawn anew."""
    people = numpy.unique(table["group"])
    generator = numpy.random.default_rng(0)
    for metric in ("exact_match", "log_prob"):
        kind = effect_kind(NAMED_METRICS[metric])
        wide = table.pivot_table(index="unit", columns=["group", "attribute"], values=f"{metric}_effect")
        cubes = wide.to_numpy().reshape(len(wide), len(people), -1)
        for count in counts:
            rows = []
            owners = numpy.repeat(numpy.arange(count), cubes.shape[2])
            for _ in range(times):
                drawn = cubes[:, generator.integers(0, len(people), count)].reshape(len(cubes), -1)
                means = wide.to_numpy().mean(1)
                for found in (intervals(drawn, owners, kind=kind), percentile(drawn)):
                    rows.append((found[0] <= means + 1e-9) & (means <= found[1] + 1e-9))
            yield {
                "kind": "real",
                "values": metric,
                "people": count,
                "answers": len(owners),
                "covered": float(numpy.mean(rows[::2])),
                "percentile": float(numpy.mean(rows[1::2])),
            }


def main(checkpoint: str | None = None) -> None:
    rows = []
    for kind, name, draw, mean in cases():
        for count in (8, 60, 300):
            row = measured(kind, draw, mean, numpy.arange(count), TIMES)
            rows.append({"kind": kind, "values": name, "answers": count, **row})
        for count in (8, 16, 60):
            people = people_of(count)
            row = measured(kind, draw, mean, people, TIMES)
            rows.append({"kind": kind, "values": name, "people": count, "answers": len(people), **row})
    nulls = []
    drawn: dict[str, tuple[Draw, Kind]] = {
        "share": (shares(0.5), "binary_difference"),
        "gamma": (effects()["gamma"][0], "real"),
    }
    for name, (draw, kind) in drawn.items():
        for people in (numpy.arange(60), numpy.arange(300), people_of(16), people_of(60)):
            grouped = int(people.max() + 1) if people.max() + 1 < len(people) else None
            rate = null_rate(draw, people, TIMES, kind=kind)
            nulls.append({"values": name, "people": grouped, "answers": len(people), "below_5": rate})
    rows += real_rows(real_effects(checkpoint), (8, 16, 60))
    table = pandas.DataFrame(rows)
    print(table.to_string(index=False, float_format="{:.3f}".format))
    print(pandas.DataFrame(nulls).to_string(index=False, float_format="{:.3f}".format))
    write_json(
        Path("runs/bench/coverage.json"),
        {"coverage": rows, "nulls": nulls, **provenance(seed=0, checkpoint=checkpoint)},
    )


if __name__ == "__main__":
    main(*sys.argv[1:2])
