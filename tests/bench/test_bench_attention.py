"""The attention benchmark: counts by hand, the same answer from every rival, no report on a failed check."""

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from longforge.bench import attention as room
from longforge.bench import contestants
from longforge.bench.attention import Options, device_of
from longforge.bench.clock import interleaved
from longforge.bench.command import attention as command
from longforge.bench.contestants import RIVALS, Unusable, our_parts, selections
from longforge.bench.inputs import make_inputs
from longforge.bench.report import fastest, plot, table
from longforge.bench.selfcheck import check_operation
from longforge.bench.work import PHASES, Shape, Work, parse_length, parse_phases
from longforge.cli import main
from longforge.errors import CheckError, InputError
from longforge.kernels.dense_attention import dense_attention
from longforge.kernels.select_blocks import cpu_tiles, select_blocks
from longforge.kernels.sparse_attention import sparse_attention
from longforge.kernels.sparse_attention.api import BACKENDS

CPU = torch.device("cpu")
SMALL = Shape(heads=4, groups=2, dim=8, index_dim=6, block_size=16, top_k=3)
MSA = "transformers-msa"
"""The one rival that is not dense; where transformers is not installed it is left out."""
COLUMNS = {"device", "phase", "length", "dtype", "index_dtype", "rival", "rival_ms", "ms", "speedup", "limit"}


@pytest.fixture(autouse=True)
def quick_rates(monkeypatch: pytest.MonkeyPatch):
    """The machine's rates are measured in a second each; here any number does."""
    monkeypatch.setattr(room, "read_rate", lambda device: 1e10)
    monkeypatch.setattr(room, "matmul_rate", lambda device, dtype: 1e11)


def bench_attention(given: Options) -> list[dict[str, Any]]:
    return [row for point in room.bench_attention(given) for row in point]


def options(**changes: Any) -> Options:
    given = Options(CPU, [200, 90], PHASES, "fp32", SMALL, chunk=32, seconds=0.05)
    return replace(given, **changes)


# --- counts -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("length", [1, 16, 17, 100, 163])
def test_pairs_are_those_counted_one_by_one(phase: Any, length: int):
    work = Work.of(phase, length, chunk=24)
    positions = range(work.first, work.keys)
    assert len(positions) == work.queries
    assert work.seen == sum(p + 1 for p in positions)
    size, k = SMALL.block_size, SMALL.top_k
    assert work.selected(SMALL) == sum(p % size + 1 + min(k - 1, p // size) * size for p in positions)


def test_a_prefill_chunk_stands_for_the_mean_of_all_chunks():
    length, chunk = 4096, 256
    work = Work.of("prefill", length, chunk)
    mean = length * (length + 1) / 2 / (length / chunk)
    assert work.seen == pytest.approx(mean, rel=1e-3)
    assert work.first == (length - chunk) // 2


def test_limits_are_the_published_ones_for_m3():
    million = 1 << 20
    decode = Work.of("decode", million, 8192)
    assert decode.limit(Shape(), 2, 2) == pytest.approx(7.88, abs=0.01)
    assert decode.limit(Shape(), 2, 1) == pytest.approx(15.5, abs=0.1)
    assert Work.of("prefill", million, 8192).limit(Shape(), 2, 2) == pytest.approx(28.4, abs=0.2)
    assert Work.of("train", 128 << 10, 8192).limit(Shape(), 2, 2) == pytest.approx(22.7, abs=0.4)


@pytest.mark.parametrize(
    ("text", "tokens"), [("4096", 4096), ("32k", 32768), ("1m", 1 << 20), (" 2K ", 2048)]
)
def test_lengths_are_read(text: str, tokens: int):
    assert parse_length(text) == tokens


@pytest.mark.parametrize("text", ["", "k", "-1", "1.5k", "0", "many"])
def test_other_lengths_are_refused(text: str):
    with pytest.raises(InputError, match="tokens like 4096, 32k or 1m expected"):
        parse_length(text)


def test_phases_are_read_in_their_order_and_others_refused():
    assert parse_phases("train, decode") == ("decode", "train")
    with pytest.raises(InputError, match="got 'decode,fly'"):
        parse_phases("decode,fly")


# --- contestants --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("phase", PHASES)
def test_every_dense_rival_on_this_machine_computes_dense_attention(phase: Any):
    work = Work.of(phase, 113, chunk=24)
    inputs = make_inputs(SMALL, work, torch.float32, CPU)
    wanted, _ = dense_attention(inputs.q, inputs.k_pages, inputs.v_pages, inputs.layout, backend="reference")
    ran = []
    for name, build in RIVALS.items():
        if name == MSA:
            continue
        try:
            got: Any = build(inputs)()
        except Unusable:
            continue
        ran.append(name)
        if phase == "train":
            assert [g.shape[-1] for g in got] == [SMALL.dim] * 3
            continue
        if name.startswith("sdpa"):
            per_group = SMALL.heads // SMALL.groups
            shape = (SMALL.groups, per_group, work.queries, SMALL.dim)
            got = got.reshape(shape).permute(2, 0, 1, 3).flatten(1, 2)
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    assert ran == ["sdpa-flash", "sdpa-math", "longforge-dense"]


@pytest.mark.parametrize("phase", ["decode", "prefill"])
@pytest.mark.parametrize("length", [20, 113, 128, 401])
@pytest.mark.parametrize("top_k", [1, 3, 9])
def test_transformers_msa_selects_and_attends_as_ours(phase: Any, length: int, top_k: int):
    pytest.importorskip("transformers", minversion="5.17")
    inputs = make_inputs(replace(SMALL, top_k=top_k), Work.of(phase, length, 40), torch.float32, CPU)
    rival: Any = RIVALS[MSA](inputs)
    blocks = select_blocks(inputs.index_q, inputs.index_k_pages, inputs.layout, top_k, backend="reference")
    theirs = rival.select()[0].transpose(0, 1).flatten(0, 1).tolist()
    assert [sorted(b for b in row if b >= 0) for row in theirs] == [
        [b for b in row if b >= 0] for row in blocks.flatten(0, 1).tolist()
    ]
    wanted, _ = sparse_attention(
        inputs.q, inputs.k_pages, inputs.v_pages, blocks, inputs.layout, backend="reference"
    )
    torch.testing.assert_close(rival(), wanted, rtol=1e-4, atol=1e-5)


def test_where_transformers_msa_does_not_run(monkeypatch: pytest.MonkeyPatch):
    build = RIVALS[MSA]
    inputs = make_inputs(SMALL, Work.of("prefill", 113, 24), torch.float32, CPU)
    training = make_inputs(SMALL, Work.of("train", 96, 24), torch.float32, CPU)
    monkeypatch.setattr(contestants, "version", lambda name: "5.23.0.dev0")
    with pytest.raises(Unusable, match="gives the index branch no gradient"):
        build(training)
    monkeypatch.setitem(contestants.ROOM, "cpu", 1000)
    with pytest.raises(Unusable, match=r"needs more than 0 GiB for masks, scores or copies"):
        build(inputs)
    monkeypatch.setattr(contestants, "version", lambda name: "4.57.1")
    with pytest.raises(Unusable, match=r"transformers 5.17 or later expected, 4.57.1 found"):
        build(inputs)

    def missing(name: str) -> str:
        raise contestants.PackageNotFoundError(name)

    monkeypatch.setattr(contestants, "version", missing)
    with pytest.raises(Unusable, match="not installed"):
        build(inputs)


@pytest.mark.skipif(cpu_tiles.TILE_ENGINE is None, reason="no tiles of bf16 on this processor")
def test_certified_int8_selection_is_timed_in_decode_on_a_cpu():
    shape = Shape(heads=4, groups=2, dim=32, index_dim=128, block_size=128, top_k=3)
    decode = make_inputs(shape, Work.of("decode", 2000, 24), torch.bfloat16, CPU)
    kinds = selections(decode)
    assert [*kinds] == ["bf16", "int8", "int8 certified"] and set(kinds) <= set(contestants.INDEX_BYTES)
    assert torch.equal(kinds["int8 certified"](), kinds["bf16"]())
    prefill = make_inputs(shape, Work.of("prefill", 2000, 24), torch.bfloat16, CPU)
    assert [*selections(prefill)] == ["bf16", "int8"]
    odd = make_inputs(replace(shape, index_dim=6), Work.of("decode", 300, 24), torch.bfloat16, CPU)
    assert [*selections(odd)] == ["bf16", "int8"]


def test_training_rivals_compute_the_same_gradients(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(
        torch, "randn_like", torch.ones_like
    )  # one cotangent, whatever the order of dimensions
    inputs = make_inputs(SMALL, Work.of("train", 96, 24), torch.float32, CPU)
    flash: Any = RIVALS["sdpa-flash"](inputs)()
    dense: Any = RIVALS["longforge-dense"](inputs)()
    torch.testing.assert_close(flash[0].permute(2, 0, 1, 3).flatten(1, 2), dense[0], rtol=1e-4, atol=1e-5)
    for theirs, mine in zip(flash[1:], dense[1:], strict=True):
        torch.testing.assert_close(theirs[:, 0].transpose(0, 1), mine.flatten(0, 1), rtol=1e-4, atol=1e-5)


def test_with_every_block_selected_our_whole_step_is_dense_attention():
    shape = replace(SMALL, top_k=20)
    inputs = make_inputs(shape, Work.of("decode", 113, 24), torch.float32, CPU)
    wanted, _ = dense_attention(inputs.q, inputs.k_pages, inputs.v_pages, inputs.layout)
    torch.testing.assert_close(
        our_parts(inputs, selections(inputs)["fp32"])["whole"](), wanted, rtol=1e-4, atol=1e-5
    )


def test_keys_by_head_are_the_pages_in_order():
    inputs = make_inputs(SMALL, Work.of("decode", 1000, 24), torch.float32, CPU)
    table = inputs.layout.page_table[0].tolist()
    assert sorted(table) == list(range(63)) and table != sorted(table)
    for position in (0, 15, 16, 500, 999):
        page = inputs.k_pages[table[position // 16], position % 16]
        assert torch.equal(inputs.k_by_head[0, :, position], page)


def test_rounds_are_interleaved():
    order: list[str] = []
    steps = {name: (lambda name=name: order.append(name)) for name in "ab"}
    timings = interleaved(steps, CPU, seconds=0.0)
    assert timings["a"].rounds == 3 and timings["a"].low <= timings["a"].ms <= timings["a"].high
    runs = "".join(a for a, b in zip(order, [*order[1:], ""], strict=True) if a != b)
    assert runs.endswith("ab" * 3)


# --- report -------------------------------------------------------------------------------------------------


def test_rows_say_what_was_measured(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    rows = bench_attention(options())
    assert capsys.readouterr().out == ""
    assert {(r["phase"], r["length"]) for r in rows} == {(p, n) for p in PHASES for n in (90, 200)}
    for row in rows:
        assert set(row) >= COLUMNS
        assert row["speedup"] == pytest.approx(row["rival_ms"] / row["ms"])
        assert row["ms_low"] <= row["ms"] <= row["ms_high"] and row["rounds"] >= 3
        assert row["selection_ms"] > 0 and row["attention_ms"] > 0 and row["combine_ms"] is None
        assert (row["index_loss_ms"] is not None) == (row["phase"] == "train")
        assert row["bandwidth_fraction"] == pytest.approx(row["bytes"] / row["ms"] * 1e3 / 1e10)
        assert row["backend"] == "cpu"
    best = fastest(rows)
    assert len(best) == 10  # fp32 and int8 index keys, in training fp32 alone
    text = table(rows)
    assert len(text.splitlines()) == 2 + len(best) and "speed-up" in text
    plot(rows, tmp_path / "speed.png")
    assert (tmp_path / "speed.png").read_bytes().startswith(b"\x89PNG")
    assert [p.name for p in tmp_path.iterdir()] == ["speed.png"]


def test_a_wrong_operation_is_not_measured(monkeypatch: pytest.MonkeyPatch):
    right = BACKENDS["cpu"]

    def wrong(*given: Any) -> Any:
        out, lse = right(*given)
        return out * 1.01, lse

    check_operation("decode", SMALL, torch.float32, CPU)
    monkeypatch.setitem(BACKENDS, "cpu", wrong)
    with pytest.raises(
        CheckError, match=r"decode output on cpu within 2e-05 of the reference expected, got 0.01"
    ):
        bench_attention(options())


def test_a_wrong_selection_is_not_measured(monkeypatch: pytest.MonkeyPatch):
    from longforge.kernels.select_blocks.api import BACKENDS as SELECTORS

    right = SELECTORS["cpu"]

    def wrong(index_q: Any, *given: Any) -> Any:
        return right(-index_q, *given)

    monkeypatch.setitem(SELECTORS, "cpu", wrong)
    with pytest.raises(CheckError, match=r"the best 3 blocks up to .* expected"):
        bench_attention(options())


def test_what_is_too_long_or_too_large_is_named_and_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    assert bench_attention(options(phases=("decode",), longest=0.0)) == []
    assert "our side alone would take more than 0 s" in capsys.readouterr().err
    assert bench_attention(options(phases=("decode",), minutes=0.0)) == []
    assert "decode 90: left out, the time is up" in capsys.readouterr().err
    monkeypatch.setattr(room.Bench, "_memory", lambda self: 0)
    assert bench_attention(options(phases=("decode",))) == []
    assert "decode 90: left out, it needs about" in capsys.readouterr().err


def test_a_hopeless_rival_is_named_and_not_timed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def slow(inputs: Any) -> Any:
        fast = RIVALS["sdpa-flash"](inputs)
        return lambda: (time.sleep(0.2), fast())[1]

    monkeypatch.setitem(RIVALS, "sdpa-math", slow)
    rows = bench_attention(options(phases=("decode",)))
    assert {row["rival"] for row in rows} - {MSA} == {"sdpa-flash", "longforge-dense"}
    told = capsys.readouterr().err
    assert told.count("no sdpa-math (more than 5 times as slow as another rival)") == 1
    assert told.count("no flashinfer (CUDA only)") == 1


def test_a_rival_that_compiles_for_long_is_timed_without_that(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(room, "LONG", 0.2)

    def compiled_first(inputs: Any) -> Any:
        step, left = RIVALS["sdpa-flash"](inputs), [0.3]
        return lambda: (left and time.sleep(left.pop()), step())[1]

    monkeypatch.setitem(RIVALS, "sdpa-math", compiled_first)
    rows = bench_attention(options(phases=("decode",)))
    assert {row["rival"] for row in rows} - {MSA} == {"sdpa-flash", "sdpa-math", "longforge-dense"}


def test_a_device_that_is_not_here_is_refused():
    with pytest.raises(InputError, match="device: cuda or cpu expected, got 'tpu'"):
        device_of("tpu")
    if not torch.cuda.is_available():
        assert device_of(None) == CPU
        with pytest.raises(InputError, match="torch finds no CUDA device"):
            device_of("cuda")
    with pytest.raises(InputError, match="got fp16"):
        bench_attention(options(dtype="fp16"))


SIZES = ["--heads", "4", "--groups", "2", "--dim", "8", "--index-dim", "6", "--block", "16", "--top-k", "3"]


def test_the_command_prints_one_array(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    given = ["bench", "attention", "--device", "cpu", "--lengths", "64,0.1k", "--phase", "decode", "--json"]
    monkeypatch.setattr(sys, "argv", ["longforge", *given])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2 and "tokens like 4096" in capsys.readouterr().err
    out = tmp_path / "rows.json"
    given = ["--device", "cpu", "--lengths", "64", "--phase", "decode", "--dtype", "fp32", "--json"]
    monkeypatch.setattr(sys, "argv", ["longforge", "bench", "attention", *given, *SIZES, "--out", str(out)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    rows = json.loads(capsys.readouterr().out)
    assert rows and all(set(row) >= COLUMNS for row in rows)
    assert json.loads(out.read_text()) == rows


def test_the_module_takes_the_same_options_without_the_command(tmp_path: Path):
    given = [
        "attention",
        "--device",
        "cpu",
        "--lengths",
        "64",
        "--phase",
        "decode",
        "--dtype",
        "fp32",
        *SIZES,
    ]
    done = subprocess.run(
        [sys.executable, "-m", "longforge.bench", *given], capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].split()[0] == "decode"
    wrong = [sys.executable, "-m", "longforge.bench", "attention", "--phase", "fly", "--device", "cpu"]
    done = subprocess.run(wrong, capture_output=True, text=True, timeout=200)
    assert done.returncode == 2 and done.stderr.startswith("longforge: phase: some of ")


def test_the_command_and_the_module_have_the_same_options():
    import inspect

    from longforge.bench.command import defaults
    from longforge.cli.bench import attention as verb

    mine = {n: p.default for n, p in inspect.signature(verb).parameters.items()}
    mine["json"] = mine.pop("as_json")
    assert mine == defaults() and set(defaults()) == set(inspect.signature(command).parameters)
