"""The tools: grep means `re.search` on every line, and nothing outside the tree can be named."""

import re
import warnings
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from longforge.errors import ToolError
from longforge.forge.code_search.tools import CodeTools, ToolLimits, plain_grep_lines, required_literal
from longforge.forge.code_search.tree import SourceFile, Tree, load_tree

ATOMS = [
    "a",
    "b",
    "class ",
    "é",
    "\\n",
    "\\s",
    "[^a]",
    ".",
    "\\b",
    "^",
    "$",
    "(a|b)",
    "(?:ab)",
    "(?=b)",
    "\\Z",
]
ATOMS += ["a*", "b?", "(?i:a)", "\\.", "\t", "[ab]", "b{2}", "|", "(a)\\1", "\n", "(?!a)", "\\x61"]


def tree_of(*texts: str) -> Tree:
    return Tree(Path("/"), tuple(SourceFile(f"f{i}.py", text) for i, text in enumerate(texts)), ())


@settings(max_examples=300, deadline=None)
@given(
    texts=st.lists(st.text("ab é\n\tA.class \r\f\u2028", max_size=60), min_size=1, max_size=4),
    pattern=st.lists(st.sampled_from(ATOMS), min_size=1, max_size=5).map("".join),
    flags=st.sampled_from(["", "(?i)", "(?s)", "(?m)", "(?x)"]),
)
@example(texts=["", "class "], pattern="class ", flags="")
@example(texts=["a\nb", "ab"], pattern="a\\nb", flags="(?s)")
@example(texts=["aa a\naa"], pattern="a", flags="")
def test_grep_finds_exactly_the_lines_that_the_expression_matches(texts, pattern, flags) -> None:
    try:
        expression = re.compile(flags + pattern)
    except re.error:
        return
    tree = tree_of(*texts)
    assert list(CodeTools(tree).matches(flags + pattern, expression)) == plain_grep_lines(
        tree, flags + pattern
    )


def test_an_odd_expression_says_nothing_at_the_terminal() -> None:
    odd = "[[a]"  # "possible nested set", says the interpreter
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert CodeTools(tree_of("x[0]")).grep(odd) == "f0.py:1: x[0]"


@pytest.mark.parametrize(
    ("pattern", "literal"),
    [
        (r"class Task\b", "class Task"),
        (r"\.open\(", ".open("),
        (r"a|b", ""),
        (r"(?i)task", ""),
        (r"ab*cde", "cde"),
        (r"x\w+handler", "handler"),
    ],
)
def test_the_literal_is_what_every_match_must_contain(pattern: str, literal: str) -> None:
    assert required_literal(pattern) == literal


def test_results_are_sorted_cut_and_counted() -> None:
    long = "x = '" + "y" * 200 + "'"
    tools = CodeTools(
        tree_of("    hit 1\nhit 2\n" + long, "hit 3\nhit 4"), ToolLimits(max_hits=3, hit_width=10)
    )
    assert tools.grep("hit") == "f0.py:1: hit 1\nf0.py:2: hit 2\nf1.py:1: hit 3\n1 more"
    assert tools.grep("yyy") == "f0.py:3: x = 'yyyyy..."
    assert tools.grep("hit", "f1.py") == "f1.py:1: hit 3\nf1.py:2: hit 4"
    assert tools.grep("nothing") == "no match"


def test_read_gives_the_lines_asked_for_and_no_more_than_allowed() -> None:
    text = "".join(f"    line {n}\n" for n in range(1, 31))
    tools = CodeTools(tree_of(text), ToolLimits(default_lines=3, max_lines=5, line_width=9))
    assert tools.read("f0.py", 2) == "    line ...\n" * 2 + "    line ..."
    assert tools.read("f0.py", 29, 40).count("\n") == 1
    assert tools.read("f0.py", 1, 30).count("\n") == 4
    assert tools.call("read", {"path": "./f0.py", "start": "4", "end": "4"}) == "    line ..."


@pytest.mark.parametrize("path", ["../x.py", "/etc/passwd", "f0.py/../../x", "~/x.py", "..", "a/../../b.py"])
@pytest.mark.parametrize("tool", ["grep", "read"])
def test_a_path_outside_the_tree_is_refused_as_such(tool: str, path: str) -> None:
    arguments = {"pattern": "x", "path": path} if tool == "grep" else {"path": path, "start": 1}
    with pytest.raises(ToolError, match="outside the tree") as refusal:
        CodeTools(tree_of("x")).call(tool, arguments)
    assert "\n" not in str(refusal.value)


def test_a_link_out_of_the_tree_cannot_be_read(tmp_path: Path) -> None:
    root = tmp_path / "tree"
    root.mkdir()
    (root / "a.py").write_text("x = 1\n")
    (tmp_path / "secret.py").write_text("password = 1\n")
    (root / "link.py").symlink_to(tmp_path / "secret.py")
    tools = CodeTools(load_tree(root))
    assert tools.grep("password") == "no match"
    with pytest.raises(ToolError, match="no file"):
        tools.read("link.py", 1)


@pytest.mark.parametrize(
    ("tool", "arguments", "says"),
    [
        ("grep", {"pattern": "("}, "bad pattern"),
        ("grep", {"pattern": ""}, "not empty"),
        ("grep", {"pattern": "x" * 201}, "at most 200"),
        ("grep", {"pattern": 3}, "must be text"),
        ("grep", {"pattern": "x{99999999999}"}, "bad pattern"),
        ("grep", {}, "wrong arguments"),
        ("grep", {"pattern": "x", "colour": 1}, "wrong arguments"),
        ("read", {"path": "f0.py", "start": 9}, "no lines 9 to 20; f0.py has 2"),
        ("read", {"path": "f0.py", "start": 2, "end": 1}, "no lines 2 to 1"),
        ("read", {"path": "f0.py", "start": 0}, "no lines 0"),
        ("read", {"path": "f0.py", "start": "two"}, "start must be a line number"),
        ("read", {"path": "f0.py", "start": True}, "start must be a line number"),
        ("read", {"path": "nowhere.py", "start": 1}, "no file 'nowhere.py'"),
        ("read", {"path": "f0.py\0", "start": 1}, "path must be text"),
        ("write", {}, "no tool 'write'; there are grep, read"),
    ],
)
def test_a_wrong_call_is_refused_in_one_line(tool: str, arguments: dict, says: str) -> None:
    with pytest.raises(ToolError, match=re.escape(says)) as refusal:
        CodeTools(tree_of("a\nb\n")).call(tool, arguments)
    assert str(refusal.value).startswith("error: ") and "\n" not in str(refusal.value)


def test_the_library_is_searched_as_the_plain_twin_searches_it(library, library_tools) -> None:
    for pattern in (r"class \w+Error\(OSError", r"^import os$", r"\bTaskGroup\b"):
        found = list(library_tools.matches(pattern, re.compile(pattern)))
        assert found == plain_grep_lines(library.tree, pattern) and found
