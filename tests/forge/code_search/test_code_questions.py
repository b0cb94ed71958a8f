"""Questions: one right answer each, and two sides of the split that never meet."""

import subprocess
import sys
from collections import Counter

import pytest

from longforge.errors import InputError
from longforge.forge.code_search.index import build_index
from longforge.forge.code_search.questions import KINDS, Kind, QuestionSet, split_of
from longforge.forge.code_search.reward import score


def all_questions(questions: QuestionSet) -> list:
    return [q for by_kind in questions.questions.values() for kind in by_kind.values() for q in kind]


def test_every_kind_is_asked_with_the_right_answer(make_tree) -> None:
    root = make_tree(
        {
            "a.py": "class Base:\n    def __init__(self): pass\n    def go(self): pass\n",
            "b.py": "import a\nclass X(a.Base):\n    def run(self): pass\n",
        }
    )
    asked = {(q.kind, q.symbol): q.answer for q in all_questions(QuestionSet(build_index(root)))}
    assert asked == {
        ("defines", "Base"): "a.py",
        ("defines", "X"): "b.py",
        ("base", "X"): "a.py",
        ("method", "Base"): "go",
        ("method", "X"): "run",
        ("base_method", "X"): "go",
    }


@pytest.mark.parametrize(
    "files",
    [
        {"a.py": "class B: pass\n", "b.py": "class B: pass\n", "m.py": "from a import B\nclass X(B): pass\n"},
        {"a.py": "class B: pass\n", "m.py": "from a import B\nclass X(\n    B): pass\n"},
        {"m.py": "class B: pass\nclass X(B): pass\n"},
    ],
    ids=["name defined twice", "base not on the class line", "base in the same file"],
)
def test_no_base_question_where_a_reader_could_be_right_by_luck_or_wrong_by_luck(make_tree, files) -> None:
    asked = all_questions(QuestionSet(build_index(make_tree(files))))
    assert not [q for q in asked if q.kind == "base"]


def test_a_base_whose_name_is_defined_twice_is_asked_about_where_its_module_is_named(make_tree) -> None:
    files = {"a.py": "class B: pass\n", "b.py": "class B: pass\n", "m.py": "import a\nclass X(a.B): pass\n"}
    asked = [q for q in all_questions(QuestionSet(build_index(make_tree(files)))) if q.kind == "base"]
    assert [(q.symbol, q.answer) for q in asked] == [("X", "a.py")]


def test_a_symbol_is_on_one_side_only(library_questions: QuestionSet) -> None:
    sides = {
        split: {q.symbol for kind in by_kind.values() for q in kind}
        for split, by_kind in library_questions.questions.items()
    }
    assert not sides["train"] & sides["held_out"]
    share = len(sides["held_out"]) / sum(map(len, sides.values()))
    assert 0.25 < share < 0.35


def test_the_split_is_the_same_in_every_process() -> None:
    names = ["Task", "OrderedDict", "_Base", "Ünïcode"]
    program = (
        f"from longforge.forge.code_search.questions import split_of; print([split_of(n) for n in {names}])"
    )
    for seed in ("1", "2"):
        environment = {"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path), "PYTHONIOENCODING": "utf-8"}
        output = subprocess.run(
            [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
        ).stdout
        assert output.strip() == str([split_of(name) for name in names])


def test_a_sample_is_distinct_seeded_and_mixed_as_asked(library_questions: QuestionSet) -> None:
    mix: dict[Kind, float] = {"defines": 1.0, "base": 1.0, "method": 2.0}
    sample = library_questions.sample("held_out", 3, 80, mix)
    assert len({(q.kind, q.symbol) for q in sample}) == 80
    assert Counter(q.kind for q in sample) == {"defines": 20, "base": 20, "method": 40}
    assert sample == library_questions.sample("held_out", 3, 80, mix)
    assert sample != library_questions.sample("held_out", 4, 80, mix)
    assert all(split_of(q.symbol) == "held_out" for q in sample)


def test_a_kind_that_runs_out_is_replaced_by_the_others(library_questions: QuestionSet) -> None:
    most = len(library_questions.questions["held_out"]["base"])
    sample = library_questions.sample("held_out", 0, most + 50, {"base": 0.9, "defines": 0.1})
    counts = Counter(q.kind for q in sample)
    assert counts == {"base": most, "defines": 50}


def test_a_stream_deals_every_question_before_it_repeats_one(library_questions: QuestionSet) -> None:
    n = len(library_questions.questions["train"]["base"])
    stream = library_questions.stream("train", 0, {"base": 1.0})
    dealt = [next(stream).symbol for _ in range(2 * n)]
    assert len(set(dealt[:n])) == n and set(dealt[:n]) == set(dealt[n:]) and dealt[:n] != dealt[n:]


@pytest.mark.parametrize("mix", [{"nonsense": 1.0}, {"base": -1.0}, {}])
def test_a_wrong_mix_is_refused(library_questions: QuestionSet, mix) -> None:
    with pytest.raises(InputError, match=r"mix: expected shares of defines"):
        library_questions.sample("train", 0, 5, mix)


def test_more_questions_than_there_are_is_refused_with_both_numbers(make_tree) -> None:
    questions = QuestionSet(build_index(make_tree({"m.py": "class X: pass\n"})))
    with pytest.raises(InputError, match=r"expected 9 .* supports [01];"):
        questions.sample("train", 0, 9)


def test_the_wording_names_the_symbol_and_answers_are_never_init(library_questions: QuestionSet) -> None:
    for question in all_questions(library_questions):
        assert question.symbol in question.text.replace("?", " ").split()
        assert question.answer != "__init__"
    assert set(KINDS) == {"defines", "base", "method", "base_method"}


@pytest.mark.parametrize("answer", ["a/b.py", " a/b.py\n", "`a/b.py`", "a/b.py.", "`a/b.py`.", '"a/b.py"'])
def test_the_answer_alone_scores(answer: str) -> None:
    assert score(answer, "a/b.py") == 1.0


@pytest.mark.parametrize(
    "answer", [None, "", "b.py", "a/b.py or c.py", "The file is a/b.py", "A/B.py", "a/b"]
)
def test_anything_else_does_not(answer: str | None) -> None:
    assert score(answer, "a/b.py") == 0.0


def test_a_method_may_come_with_its_brackets() -> None:
    assert score("`run()`", "run") == 1.0
