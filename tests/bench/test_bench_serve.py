"""The serving benchmark: its rows and arithmetic, no report on a failed check, absent rivals told."""

import json
import sys
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from longforge.bench import serve as room
from longforge.bench import serve_http, serve_measures, serve_rival, serve_speculation
from longforge.bench.serve import bench_serve
from longforge.bench.serve_check import check_same
from longforge.bench.serve_ours import Answers, engine_for, first_token, generate, random_prompts
from longforge.bench.serve_rates import Deadline, Spread, decode_rate, in_turns, spread
from longforge.bench.serve_report import plot, table
from longforge.bench.serve_rows import About, headline
from longforge.bench.serve_setting import MEASURES, ServeOptions, Setting
from longforge.bench.serve_speculation import conversation_prompts, speculation
from longforge.chat import Tokenizer
from longforge.cli import main
from longforge.engine import drafts
from longforge.errors import CheckError
from longforge.model import CausalLM, shipped
from small_model import small_model, write_small_checkpoint

COLUMNS = {
    "measure", "unit", "batch", "prompt_tokens", "new_tokens", "context", "dtype", "rival_dtype", "ours",
    "ours_low", "ours_high", "rounds", "rival", "rival_value", "rival_low", "rival_high", "ratio", "headline",
    "note", "model", "threads", "device", "cores", "utc", "commit", "dirty", "versions",
}  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Two threads of one process wait for each other where other processes are busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_checkpoint(tmp_path_factory.mktemp("serve") / "small", seed=3)


def options(folder: Path, **changes: Any) -> ServeOptions:
    given: dict[str, Any] = {
        "folder": folder, "dtypes": ["fp32"], "batches": [2], "prompt": 13, "tokens": 6, "prefill": [40],
        "first_token": [60, 200], "talks": 1, "rounds": 2, "compiled": False,
    }  # fmt: skip
    return ServeOptions(**{**given, **changes})


def rows_of(given: ServeOptions) -> list[dict[str, Any]]:
    return [row for point in bench_serve(given) for row in point]


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch):
    """A machine without transformers."""

    def missing(name: str) -> str:
        raise serve_rival.PackageNotFoundError(name)

    monkeypatch.setattr(serve_rival, "version", missing)


# --- arithmetic ---------------------------------------------------------------------------------------------


def test_a_decode_rate_counts_what_comes_after_the_last_first_token():
    assert decode_rate([[1.0, 1.5, 2.0]]) == 2.0
    # One request is two tokens ahead when the other begins, at 3: four tokens follow in two seconds.
    assert decode_rate([[1.0, 2.0, 3.5, 5.0], [3.0, 4.0, 5.0]]) == 2.0


def test_a_spread_is_the_median_and_the_quartiles():
    assert spread([5.0, 1.0, 3.0, 2.0, 4.0]) == Spread(3.0, 2.0, 4.0, 5)
    assert spread([7.0]) == Spread(7.0, 7.0, 7.0, 1)


def test_contestants_take_turns_and_the_deadline_ends_the_rounds():
    order: list[str] = []

    def run(name: str):
        return lambda: float(len(order)) if order.append(name) is None else 0.0

    runs = {"a": run("a"), "b": run("b")}
    timings = in_turns(runs, 3, Deadline.after(None))
    assert order == ["a", "b"] * 3 and timings["a"] == spread([1.0, 3.0, 5.0])
    assert in_turns(runs, 3, Deadline(time.monotonic() - 1))["b"].rounds == 1


def made(ours: float, theirs: float | None, dtype: str) -> dict[str, Any]:
    rival = None if theirs is None else Spread(theirs, theirs - 1, theirs + 1, 3)
    return About("x").row("decode", "tokens/s", dtype, Spread(ours, ours - 1, ours + 1, 3), "them", rival)


def test_a_row_has_its_columns_and_the_ratio_of_its_medians():
    row = made(30.0, 20.0, "fp32")
    assert set(row) == COLUMNS and row["ratio"] == 1.5
    assert (row["ours_low"], row["rival_high"]) == (29.0, 21.0)
    assert made(30.0, None, "fp32")["ratio"] is None
    assert row["threads"] == torch.get_num_threads() and row["versions"]["torch"]


def test_the_headline_takes_the_faster_dtype_of_each_side():
    same = headline([made(30.0, 20.0, "fp32"), made(10.0, 5.0, "bf16")])
    assert [row["headline"] for row in same] == [True, False]
    mixed = headline([made(30.0, 20.0, "fp32"), made(10.0, 25.0, "bf16")])
    assert [row["headline"] for row in mixed] == [False, False, True]
    assert (mixed[2]["dtype"], mixed[2]["rival_dtype"], mixed[2]["ratio"]) == ("fp32", "bf16", 1.2)
    assert mixed[2]["rival_low"] == 24.0 and mixed[1]["ratio"] == 0.4
    unequal = headline([made(30.0, None, "fp32"), made(40.0, None, "bf16")])
    assert [row["headline"] for row in unequal] == [False, True]


# --- the check ----------------------------------------------------------------------------------------------


def test_answers_may_part_at_a_tie_and_nowhere_else():
    asked: list[tuple[Any, ...]] = []

    def gap(ids: Any, one: int, other: int) -> float:
        asked.append((list(ids), one, other))
        return 1e-5

    assert check_same("x", [[1, 2]], [[3, 4, 5]], [[3, 4, 5]], gap) == 3 and not asked
    assert check_same("x", [[1, 2]], [[3, 4, 5]], [[3, 6, 7]], gap) == 1
    assert asked == [([1, 2, 3], 4, 6)]
    with pytest.raises(CheckError, match=r"token 6 expected at 1, got 4, and their logits are 0\.5 apart"):
        check_same("x", [[1, 2]], [[3, 4]], [[3, 6]], lambda *_: 0.5)
    with pytest.raises(CheckError, match="apart"):
        check_same("x", [[1, 2]], [[3, 4]], [[3, 6]], lambda *_: float("nan"))
    with pytest.raises(CheckError, match="answers of equal length expected"):
        check_same("x", [[1]], [[3]], [[3, 4]], gap)


@pytest.mark.parametrize("there", [True, False])
def test_nothing_is_reported_while_the_check_is_red(
    there: bool, folder: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
):
    if there:
        pytest.importorskip("transformers", minversion="5.17")
    else:
        request.getfixturevalue("alone")

    def wrong(engine: Any, prompts: Any, tokens: int, stops: Any = ()) -> Answers:
        right = generate(engine, prompts, tokens, stops)
        spoiled = [[*ids[:-1], (ids[-1] + 1) % 300] for ids in right.tokens]
        return Answers(spoiled, right.times, right.begun)

    monkeypatch.setattr(room, "generate", wrong)
    with pytest.raises(CheckError, match="nothing is reported while the check fails"):
        rows_of(options(folder))


def test_a_cache_that_finds_nothing_is_no_hit(folder: Path, monkeypatch: pytest.MonkeyPatch, alone: None):
    def forgetting(*given: Any, cache: bool = True, **more: Any):
        return engine_for(*given, cache=False, **more)

    monkeypatch.setattr(serve_measures, "engine_for", forgetting)
    with pytest.raises(CheckError, match="60 tokens expected in the cache, 0 found"):
        rows_of(options(folder, measures=["first-token"]))


def test_a_stream_that_is_not_whole_is_not_timed(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    client = tmp_path / "client.py"
    client.write_text("print('[[1.0, 2.0], [1.0]]')")
    monkeypatch.setattr(serve_http.serve_client, "__file__", str(client))
    with pytest.raises(CheckError, match=r"2 streamed answers of 2 tokens expected, got \[2, 1\]"):
        serve_http._ask("http://127.0.0.1:1", [[1], [2]], 2)


# --- the measures -------------------------------------------------------------------------------------------


def test_without_transformers_its_side_is_left_out_and_that_is_told(
    folder: Path, alone: None, capsys: pytest.CaptureFixture[str]
):
    rows = rows_of(options(folder, measures=["decode", "prefill", "first-token"]))
    assert [row["measure"] for row in rows] == ["decode", "prefill", *["time to first token, hit / cold"] * 2]
    for row in rows[:2]:
        assert row["ours"] > 0 and row["rival_value"] is None and row["ratio"] is None
        assert row["note"] == "transformers is not installed"
    told = capsys.readouterr().err
    assert "transformers left out: transformers is not installed" in told
    assert "are those of our whole forward pass" in told
    assert "(transformers)" in table(rows) and "decode: transformers is not installed" in table(rows)


def test_every_measure_gives_rows_of_one_shape(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("transformers", minversion="5.17")
    monkeypatch.setattr(serve_rival, "WAYS", serve_rival.WAYS[:2])
    rows = rows_of(
        options(folder, dtypes=["fp32", "bf16"], measures=["decode", "http", "prefill", "first-token"])
    )
    kinds = [row["measure"] for row in rows if row["dtype"] == row["rival_dtype"]]
    assert kinds == [
        "decode", "decode", "decode through HTTP", "prefill", "prefill",
        *["time to first token, hit / cold"] * 2,
    ]  # fmt: skip
    for row in rows:
        assert set(row) >= COLUMNS
        assert row["ratio"] == pytest.approx(row["ours"] / row["rival_value"])
        assert row["ours_low"] <= row["ours"] <= row["ours_high"] and row["rounds"] >= 1
    for measure in ("decode", "prefill"):
        assert sum(row["headline"] for row in rows if row["measure"] == measure) == 1
    assert rows[0]["rival"].startswith("transformers ") and rows[0]["batch"] == 2
    assert rows[0]["rivals"][rows[0]["rival"]] == rows[0]["rival_value"] == max(rows[0]["rivals"].values())
    assert "continuous batching" in rows[0]["note"] + rows[0]["rival"]
    assert rows[-1]["note"] == "context raised from 96" and rows[-1]["prompt_tokens"] == 200
    json.dumps(rows)
    plot(rows, tmp_path / "rates.png")
    assert (tmp_path / "rates.png").stat().st_size > 5000
    assert len(table(rows).splitlines()) >= len(rows) + 2


def test_the_model_keeps_its_context_after_a_longer_prompt(folder: Path):
    model = CausalLM.from_pretrained(folder)
    setting = Setting(options(folder, first_token=[150]), Deadline.after(None), About("x"), {"fp32": model})
    [[row]] = serve_measures.first_tokens(setting)
    assert row["rival_rounds"] == 2 and row["note"] == "context raised from 96"
    assert model.config.max_positions == 96


def test_what_there_is_no_time_for_is_named(folder: Path, alone: None, capsys: pytest.CaptureFixture[str]):
    assert rows_of(options(folder, minutes=0.0)) == []
    told = capsys.readouterr().err
    for what in ("decode, batch 2", "http, batch 2", "prefill 40", "time to first token 60"):
        assert f"{what}: left out, the time is up" in told


def test_a_cold_prompt_that_takes_too_long_is_given_up():
    model = small_model(max_positions=200)
    engine = engine_for(model, 1, 150, 1)
    [prompt] = random_prompts(model, 1, 150, seed=1)
    assert (
        first_token(engine, prompt, Deadline(time.monotonic() - 1)) is not None
    )  # one step is the whole prompt
    small_steps = engine_for(model, 1, 150, 1)
    small_steps._scheduler._max_batch_tokens = 16
    assert first_token(small_steps, prompt, Deadline(time.monotonic() - 1)) is None
    assert not small_steps.has_work


@pytest.fixture(scope="module")
def turns() -> list[list[int]]:
    return conversation_prompts(Tokenizer.load(shipped.path()), 1, 3000)


def test_speculation_is_measured_on_the_agents_own_turns(turns: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(serve_speculation, "conversation_prompts", lambda *_: turns[:1])
    monkeypatch.setattr(serve_speculation, "LONGEST_ANSWER", 24)
    monkeypatch.setattr(
        drafts, "best_length", lambda acceptance, seconds, most: most
    )  # whether it pays or not
    given = options(shipped.path(), measures=["speculation"], rounds=1)
    setting = Setting(
        given, Deadline.after(None), About("micro"), {"fp32": CausalLM.from_pretrained(given.folder)}
    )
    setting.tokenizer = Tokenizer.load(given.folder)
    [rows] = speculation(setting)
    assert [row["drafts"] for row in rows] == [1, 2, 3]
    for row in rows:
        assert set(row) >= COLUMNS and row["rival"] == "ours, plain" and row["ratio"] > 0
        assert row["acceptance"] > 0.3 and row["drafted_tokens"] > 5
    assert "right)" in table(rows)


def test_a_conversation_gives_a_prompt_before_each_turn_of_the_agent(turns: Any):
    assert len(turns) >= 2 and all(len(a) < len(b) for a, b in pairwise(turns))
    assert all(b[: len(a) // 2] == a[: len(a) // 2] for a, b in pairwise(turns))


# --- the command --------------------------------------------------------------------------------------------


def run(monkeypatch: pytest.MonkeyPatch, *given: str) -> int:
    monkeypatch.setattr(sys, "argv", ["longforge", "bench", "serve", *given])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


def test_the_command_prints_one_array(
    folder: Path,
    alone: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
):
    out = tmp_path / "rows.json"
    given = [
        "--measures",
        "decode,prefill",
        "--batches",
        "1",
        "--prompt",
        "9",
        "--tokens",
        "4",
        "--rounds",
        "1",
    ]
    given += ["--dtypes", "fp32", "--threads", "1", "--json", "--out", str(out)]
    assert run(monkeypatch, str(folder), *given) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["prompt_tokens"] for row in rows] == [9, 95]  # without --prefill: what the context holds
    assert all(set(row) >= COLUMNS for row in rows) and json.loads(out.read_text()) == rows


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["--measures", "fly"], f"measures: some of {', '.join(MEASURES)} expected, got 'fly'"),
        (["--dtypes", "fp16"], "dtypes: some of bf16, fp32 expected, got 'fp16'"),
        (["--batches", "1,x"], "batches: whole numbers like 1,16 expected"),
        (["--tokens", "1"], "tokens: at least 2 expected, got 1"),
        (["--prompt", "95"], "length: at most the model's 96 positions expected, got 223"),
        (["--rounds", "0"], "rounds: at least 1 expected, got 0"),
    ],
)
def test_options_that_do_not_fit_are_refused(
    given: list[str],
    told: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    assert run(monkeypatch, str(folder), *given) == 2
    assert told in capsys.readouterr().err


def test_measures_have_one_name_each():
    assert tuple(room.RUNS) == MEASURES
