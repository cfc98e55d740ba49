import pytest

from circuits.errors import CircuitsError
from circuits.facts import DatasetSettings, make_dataset, word_tokenizer
from circuits.interventions import matching_positions, pair_formats, pair_groups
from circuits.tasks import facts_in_common, one_answer_each, pair_facts


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """Whole biographies, which tell six facts each, and questions about the same people."""
    settings = DatasetSettings(people=6, biographies=2, row="biography")
    dataset = make_dataset(tmp_path_factory.mktemp("facts"), settings)
    return {split: dataset.task(split, word_tokenizer()) for split in ("bio", "qa_id")}


def said(task):
    """Of each answer the text of its tokens."""
    return [
        " ".join(task.token_texts[int(token)] for token in task.tokens[row.example, row.start : row.end])
        for row in task.answers.itertuples()
    ]


def test_facts_of_whole_biographies_are_paired_with_questions(told):
    bio, qa = told["bio"], told["qa_id"]
    assert len(bio.answers) == 6 * len(bio)
    found = pair_formats(qa, bio)
    assert len(found) == len(found.answers) == len(qa)
    assert said(found) == said(qa)
    keys = ["group", "attribute", "value"]
    assert found.answers[keys].equals(qa.answers[keys])
    source, target = pair_groups(qa, bio)
    assert (source.tokens == found.tokens).all()
    assert (target.tokens == qa.tokens).all()
    # the tokens that predict the answers match, and so do those of the subject's last mention
    match = matching_positions(source, target)
    for row, other in zip(source.answers.itertuples(), target.answers.itertuples(), strict=True):
        pairs = match[match[:, 0] == row.example][:, 1:].tolist()
        assert [row.start - 1, other.start - 1] in pairs
        mentions = source.span("subject")[row.example, : row.start].nonzero().flatten().tolist()
        asked = target.span("subject")[other.example, : other.start].nonzero().flatten().tolist()
        assert [mentions[-1], asked[-1]] in pairs


def test_each_answer_of_an_example_becomes_an_example(told):
    bio = told["bio"]
    alone = one_answer_each(bio)
    assert alone.answers["example"].tolist() == list(range(len(bio.answers)))
    assert said(alone) == said(bio)
    assert said(one_answer_each(bio, [7, 2])) == [said(bio)[7], said(bio)[2]]


def test_facts_in_common_are_those_of_a_loop(told):
    bio, qa = told["bio"], told["qa_id"]
    found = facts_in_common(bio, qa)
    wanted = {}
    for place, one in enumerate(bio.answers.itertuples()):
        for where, other in enumerate(qa.answers.itertuples()):
            if (one.group, one.attribute) == (other.group, other.attribute):
                wanted.setdefault((one.group, one.attribute), (place, where))
    rows = found[["group", "attribute", "answer_0", "answer_1"]].itertuples(index=False, name=None)
    assert {(group, attribute): places for group, attribute, *places in rows} == {
        fact: [*places] for fact, places in wanted.items()
    }
    one, other = pair_facts(bio, qa, 5, seed=3)
    assert said(one) == said(other)
    assert len(one) == 5
    asked = set(qa.answers["group"])
    few = bio.select(bio.answers.loc[~bio.answers["group"].isin(asked), "example"].unique().tolist())
    with pytest.raises(CircuitsError, match="have no fact in common"):
        pair_facts(few, qa)
