"""The report is one file, shows both sides of every held-out question, and never runs what an agent wrote."""

import json

import pytest

from longforge.errors import RunError
from longforge.forge.report import write_report
from longforge.observe import MetricsLog, passport

HOSTILE = "<script>alert('x')</script>"


def episode(phase, question, reward, answer="a.py"):
    call = {
        "id": "1",
        "type": "function",
        "function": {"name": "grep", "arguments": '{"pattern": "class X"}'},
    }
    return {
        "id": f"{phase}/{question}", "group": question, "phase": phase, "step": 0, "question": question,
        "expected": "b.py", "kind": "base", "answer": answer, "reward": reward, "outcome": "answered",
        "versions": [0], "messages": [
            {"role": "system", "content": "hidden system text"},
            {"role": "user", "content": question},
            {"role": "assistant", "content": "", "reasoning_content": "find class X", "tool_calls": [call]},
            {"role": "tool", "content": HOSTILE, "tool_call_id": "1"},
            {"role": "assistant", "content": answer},
        ],
    }  # fmt: skip


@pytest.fixture
def run(tmp_path):
    rate = {"success": 0.5, "low": 0.1, "high": 0.9, "n": 2, "kinds": {"base": {"success": 0.5, "n": 2}}}
    summary = {
        "name": "demo", "finished": True, "steps": 2, "seconds": 90.0, "before": rate, "after": rate,
        "phase_seconds": {"train": 3.0}, "passport": passport(),
    }  # fmt: skip
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    (tmp_path / "config.toml").write_text('name = "demo"\n')
    with MetricsLog(tmp_path, tensorboard=False) as log:
        for step in (1, 2):
            log.write(step, {"reward": 0.4, "staleness_mean": 0.5, "staleness_max": 1, "entropy": 1.0})
    folder = tmp_path / "episodes"
    folder.mkdir()
    rows = [
        ("before", "which X?", 0.0),
        ("after", "which X?", 1.0),
        ("before", "which Y?", 1.0),
        ("train", "which Z?", 1.0),
        ("before", "which part?", 0.5),
        ("after", "which part?", 0.0),
    ]
    for i, (phase, question, reward) in enumerate(rows):
        (folder / f"{i}.json").write_text(json.dumps(episode(phase, question, reward)))
    return tmp_path


def test_the_page_shows_thinking_calls_and_both_sides(run):
    page = write_report(run).read_text()
    assert "find class X" in page and "class X" in page and "wrong, then right (1)" in page
    assert "one side (1)" in page and "which Z?" not in page
    assert "unchanged (1)" in page, "part of a reward is no success"


def test_what_an_agent_wrote_is_shown_and_not_run(run):
    page = write_report(run).read_text()
    assert HOSTILE not in page and "&lt;script&gt;alert" in page


def test_half_a_surrogate_pair_does_not_cost_the_page(run):
    (run / "episodes" / "9.json").write_text(json.dumps(episode("after", "which Y?", 1.0, "\ud800")))
    assert "<b>?</b>" in write_report(run).read_text(encoding="utf-8")


def test_the_page_needs_no_network(run):
    page = write_report(run).read_text()
    assert "http://" not in page and "https://" not in page and "data:image/png;base64," in page
    assert (run / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_a_folder_without_a_summary_is_one_line(tmp_path):
    with pytest.raises(RunError, match=r"summary\.json"):
        write_report(tmp_path)
