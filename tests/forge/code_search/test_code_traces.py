"""Traces: honest transcripts, varied skill, new names that are consistent, and no held-out subject."""

import random
import re
from itertools import islice

import pytest

from longforge.errors import ToolError
from longforge.forge.code_search.prompts import SYSTEM_PROMPT, TOOL_SPECS
from longforge.forge.code_search.questions import split_of
from longforge.forge.code_search.rename import NamePool, name_parts, rename_messages, rename_text
from longforge.forge.code_search.reward import score
from longforge.forge.code_search.scripted import (
    AVERAGE_HABITS,
    BEST_HABITS,
    Habits,
    habit_success,
    parse_hits,
    run_scripted,
)
from longforge.forge.code_search.traces import TraceMaker, corpus, synthesize
from longforge.protocol import Message


@pytest.fixture(scope="module")
def run_tool(library_tools):
    results: dict = {}

    def run(name: str, arguments: dict) -> str:
        key = (name, *arguments.items())
        if key not in results:
            results[key] = library_tools.call(name, arguments)
        return results[key]

    return run


@pytest.fixture(scope="module")
def traces(library, library_tools):
    return list(islice(synthesize(library, library_tools, seed=1), 400))


def test_the_ceilings_leave_room_to_learn(library_questions, run_tool) -> None:
    questions = library_questions.sample("held_out", 0, 200)
    assert habit_success(questions, run_tool, BEST_HABITS, 0) >= 0.95
    imitated = sum(habit_success(questions, run_tool, AVERAGE_HABITS, seed) for seed in range(3)) / 3
    assert 0.35 <= imitated <= 0.55


@pytest.mark.parametrize("habit", ["precise", "retry", "choose", "follow", "well_ranged", "skip_init"])
def test_no_habit_alone_is_the_whole_skill(library_questions, run_tool, habit: str) -> None:
    questions = library_questions.sample("train", 0, 120)
    perfect_but_one = Habits(**{**vars(BEST_HABITS), habit: 0.0})
    worse = habit_success(questions, run_tool, perfect_but_one, 0)
    if habit == "retry":
        assert worse >= 0.95, "a precise agent never needs to retry"
    else:
        assert worse < 0.99


def test_traces_never_ask_about_a_held_out_symbol(library, library_questions, traces) -> None:
    held_out = {q.symbol for kind in library_questions.questions["held_out"].values() for q in kind}
    known = {entry.name for entry in library.classes}
    for trace in traces:
        assert trace.question.symbol not in held_out
        assert trace.question.symbol in trace.messages[1].content
        if not trace.renamed:
            assert split_of(trace.question.symbol) == "train" and trace.question.symbol in known


def test_a_trace_reads_like_an_episode(traces) -> None:
    for trace in traces:
        roles = [message.role for message in trace.messages]
        calls = (len(roles) - 3) // 2
        assert roles == ["system", "user", *["assistant", "tool"] * calls, "assistant"]
        assert 1 <= calls <= 4
        assert trace.messages[0].content == SYSTEM_PROMPT and trace.tools == TOOL_SPECS
        assert trace.messages[-1].content == trace.answer
        assert trace.correct == (score(trace.answer, trace.question.answer) == 1.0)
        for asked, told in zip(trace.messages[2:-1:2], trace.messages[3:-1:2], strict=True):
            assert asked.tool_calls[0].id == told.tool_call_id
            assert asked.thinking and len(asked.thinking.split()) <= 15


def test_results_in_traces_that_keep_their_names_are_the_tools_own(library_tools, traces) -> None:
    for trace in [trace for trace in traces if not trace.renamed][:60]:
        for asked, told in zip(trace.messages[2:-1:2], trace.messages[3:-1:2], strict=True):
            call = asked.tool_calls[0]
            try:
                result = library_tools.call(call.name, call.arguments)
            except ToolError as refusal:
                result = str(refusal)
            assert told.content == result


def test_new_names_are_consistent_through_a_trace(traces) -> None:
    """Where an agent was right, its answer is still to be read in what the tools told it."""
    renamed = [trace for trace in traces if trace.renamed]
    assert 0.6 < len(renamed) / len(traces) < 0.8
    for trace in renamed:
        shown = "\n".join(message.content for message in trace.messages if message.role == "tool")
        first = trace.messages[2].tool_calls[0].arguments["pattern"]
        if trace.correct:
            assert trace.answer in shown
        if first.startswith("class "):
            assert re.search(first, shown)


def test_both_skills_and_both_outcomes_are_shown(traces) -> None:
    thoughts = [message.thinking or "" for trace in traces for message in trace.messages]
    for words in (
        "find class",
        "look around",
        "base is",
        "read from there",
        "read near",
        "not shown",
        "no match",
    ):
        assert any(words in thought for thought in thoughts), words
    assert 0.35 < sum(trace.correct for trace in traces) / len(traces) < 0.65


def test_a_numbered_trace_is_the_same_whatever_was_made_before(library, library_tools, traces) -> None:
    maker = TraceMaker(library, library_tools, seed=1)
    assert [maker.trace(number) for number in (57, 3, 57)] == [traces[57], traces[3], traces[57]]
    assert TraceMaker(library, library_tools, seed=2).trace(3) != traces[3]


def test_an_agent_out_of_turns_answers_with_its_best_guess(library_questions, run_tool) -> None:
    (question,) = library_questions.sample("train", 0, 1, {"base_method": 1.0})
    episode = run_scripted(question, run_tool, BEST_HABITS, random.Random(0), max_turns=2)
    assert len(episode.messages) == 5 and episode.answer.endswith(".py") and not episode.correct


def test_an_alias_is_followed(make_tree) -> None:
    from longforge.forge.code_search.index import build_index
    from longforge.forge.code_search.questions import QuestionSet
    from longforge.forge.code_search.tools import CodeTools

    files = {
        "b.py": "class Base:\n    def go(self): pass\n",
        "m.py": "from b import Base as Z\nclass X(Z): pass\n",
    }
    index = build_index(make_tree(files))
    found = {
        (q.kind, run_scripted(q, CodeTools(index.tree).call, BEST_HABITS, random.Random(0)).correct)
        for by_kind in QuestionSet(index).questions.values()
        for kind in ("base", "base_method")
        for q in by_kind[kind]
        if q.symbol == "X"
    }
    assert ("base", True) in found


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("HTTPServer", ["HTTP", "Server"]),
        ("_snake_case", ["snake", "case"]),
        ("Base64IO", ["Base", "IO"]),
        ("X", ["X"]),
    ],
)
def test_names_come_apart_at_their_seams(name: str, parts: list[str]) -> None:
    assert name_parts(name) == parts


def test_renaming_is_one_to_one_and_leaves_the_protocol_alone() -> None:
    messages = [
        Message("user", "Which file defines class HTTPServer?"),
        Message("tool", "http/server.py:12: class HTTPServer(socketserver.TCPServer):\nno match\n3 more"),
    ]
    names = ["HTTPServer", "TCPServer", "socketserver", "http", "server"]
    renamed, table = rename_messages(messages, names, NamePool(names), random.Random(3))
    assert len(set(table.values())) == len(table)
    server = table["Server"]
    assert renamed[0].content == f"Which file defines class {table['HTTP']}{server}?"
    assert server[0].isupper() and server in renamed[1].content.split("(")[1]
    assert renamed[1].content.endswith("\nno match\n3 more") and ".py:12: class " in renamed[1].content
    assert rename_text("httpServer server_x", table) == f"{table['http']}{server} {table['server']}_x"


def test_hits_are_read_back_from_a_result() -> None:
    hits = parse_hits("a/b c.py:12: class X:\nno match\n3 more\nerror: a.py:1 x")
    assert [(hit.path, hit.line, hit.text) for hit in hits] == [("a/b c.py", 12, "class X:")]


def test_the_corpus_is_the_source_text_without_number_tables(library) -> None:
    pieces = list(corpus(library, 4000))
    assert 5_000_000 < sum(map(len, pieces)) <= sum(len(file.text) for file in library.tree.files)
    assert max(map(len, pieces)) < 12_000
    assert "".join(pieces).count("class TaskGroup") == 1
