"""Packing and sources: real tokens only, the right weights, the same stream after a restart."""

import numpy as np
import pytest
import torch

from longforge.chat.tokenizer import train_tokenizer
from longforge.errors import ConfigError
from longforge.model import CausalLM
from longforge.protocol import Message, ToolCall, ToolSpec
from longforge.training.config import load_config
from longforge.training.data import BatchStream, Sample, pack
from longforge.training.losses import cross_entropy, mtp_loss, next_token_edges
from longforge.training.samples import Conversation, ConversationSource, TextSource
from small_training import TINY

MESSAGES = (
    Message("user", "Where is class Foo? ]~b]ai [e~["),
    Message("assistant", thinking="Search for it.", tool_calls=(ToolCall("grep", {"pattern": "class Foo"}),)),
    Message("tool", "a/b.py:3: class Foo:"),
    Message("assistant", "a/b.py", thinking="Found."),
)
TOOLS = (ToolSpec("grep", "search"),)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(
        ["class Foo def bar return self. Search for it. Found. a/b.py ai user tool"] * 3, 360
    )


class Numbers:
    """Sample i is `i` written length(i) times."""

    def __init__(self, offset=0):
        self.offset = offset

    def sample(self, number):
        length = 1 + (number * 7) % 11
        return Sample(np.full(length, number + self.offset), np.ones(length, dtype=np.float32), (0, length))


def test_weight_one_is_on_what_the_assistant_wrote_and_nothing_else(tokenizer):
    source = ConversationSource(lambda _: Conversation(MESSAGES, TOOLS), tokenizer, background=0.1)
    sample = source.sample(0)
    spoken = np.flatnonzero(sample.weights == 1.0)
    runs = np.split(spoken, np.flatnonzero(np.diff(spoken) > 1) + 1)
    texts = [tokenizer.decode(sample.ids[run].tolist()) for run in runs]
    assert len(texts) == 2
    assert texts[0].startswith("<mm:think>Search for it.</mm:think>") and texts[0].endswith("[e~[")
    assert "class Foo" in texts[0] and "a/b.py:3" not in texts[0]
    assert texts[1] == "<mm:think>Found.</mm:think>a/b.py[e~["
    assert sample.answer == (int(runs[1][0]), int(runs[1][-1]) + 1)
    assert np.allclose(np.delete(sample.weights, spoken), 0.1)


def test_a_conversation_over_the_limit_is_cut(tokenizer):
    source = ConversationSource(lambda _: Conversation(MESSAGES, TOOLS), tokenizer, max_tokens=100)
    assert len(source.sample(0)) == 100


def test_text_chunks_are_seeded_and_start_at_a_line(tokenizer):
    texts = ["first = 1\nsecond = 2\n" * 5, "third = 3\n" * 7]
    source = TextSource(texts, tokenizer, tokens=9, weight=0.2, seed=5)
    for number in range(20):
        sample = source.sample(number)
        text = tokenizer.decode(sample.ids.tolist())
        assert text.startswith(("first", "second", "third")) and len(sample) <= 9
        assert np.array_equal(sample.ids, source.sample(number).ids) and np.allclose(sample.weights, 0.2)


def test_openings_end_after_the_first_turn_and_are_the_same_every_time(tokenizer):
    def lengths():
        source = ConversationSource(lambda _: Conversation(MESSAGES, TOOLS), tokenizer, openings=0.5, seed=4)
        return [len(source.sample(i)) for i in range(60)]

    whole = len(ConversationSource(lambda _: Conversation(MESSAGES, TOOLS), tokenizer).sample(0))
    opening = ConversationSource(lambda _: Conversation(MESSAGES, TOOLS), tokenizer, openings=1.0).sample(0)
    assert opening.answer[1] == len(opening) < whole and opening.weights[-1] == 1.0
    assert set(lengths()) == {whole, len(opening)} and lengths() == lengths()


def test_packing_adds_no_token_and_keeps_paths_apart():
    samples = [Numbers().sample(i) for i in (1, 2, 3)]
    batch = pack(samples, 4)
    lengths = [len(sample) for sample in samples]
    assert batch.ids.tolist() == [i for i, n in zip((1, 2, 3), lengths, strict=True) for _ in range(n)]
    assert batch.layout.paths.bincount().tolist() == lengths
    assert [stop - start for start, stop in batch.answers] == lengths
    for path, (start, stop) in enumerate(batch.answers):
        assert batch.layout.paths[start:stop].unique().tolist() == [path]


def forked(seed=0, opening=13):
    """Samples that begin alike, and one that does not."""
    rng = np.random.default_rng(seed)
    head = rng.integers(0, 40, opening)
    tails = [rng.integers(0, 40, n) for n in (6, 9, 3, 11)]
    samples = [
        Sample(
            np.concatenate([head, tail]),
            np.repeat([0.0, 1.0], [opening, len(tail)]).astype(np.float32),
            (opening, opening + len(tail)),
        )
        for tail in tails
    ]
    return [*samples, Sample(rng.integers(0, 40, 10), np.ones(10, dtype=np.float32))]


@pytest.mark.parametrize("phase", ["warmup", "sparse"])
def test_a_common_beginning_is_computed_once_and_changes_no_loss_and_no_gradient(phase):
    torch.manual_seed(0)
    model = CausalLM(TINY).double()
    results = []
    for share in (False, True):
        batch = pack(forked(), 4, share=share)
        model.zero_grad()
        hidden = model.forward_packed(batch.ids, batch.layout, phase=phase).hidden
        edges = next_token_edges(batch.ids, batch.layout, batch.weights)
        main = cross_entropy(hidden, edges, model.logits)
        ahead = mtp_loss(model, hidden, batch.ids, batch.layout, batch.weights).loss
        (main + ahead).backward()
        gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        results.append((batch.ids.numel(), main, ahead, gradients))
    (apart, *plain, gradients), (shared, *merged, merged_gradients) = results
    assert shared == apart - 3 * 8
    torch.testing.assert_close(merged, plain, rtol=1e-12, atol=0)
    for name in gradients:
        torch.testing.assert_close(merged_gradients[name], gradients[name], rtol=1e-10, atol=1e-14)


def test_what_an_assistant_wrote_is_never_shared():
    one, other = forked(3)[0], forked(3)[0]
    batch = pack([one, other], 4)
    assert int((batch.weights == 1.0).sum()) == 2 * 6
    first, second = batch.answers
    assert torch.equal(batch.ids[slice(*first)], batch.ids[slice(*second)])


def test_every_sample_of_a_source_comes_once_and_batches_stay_within_their_tokens():
    stream = BatchStream({"a": (Numbers(), 0.7), "b": (Numbers(1000), 0.3)}, tokens=30, block_size=4, seed=1)
    seen = []
    for _ in range(60):
        batch = stream.next()
        assert batch.ids.numel() <= 30
        seen += [int(batch.ids[start]) for start, _ in batch.answers]
    first, second = [i for i in seen if i < 1000], [i - 1000 for i in seen if i >= 1000]
    assert first == list(range(len(first))) and second == list(range(len(second)))
    assert 0.6 < len(first) / len(seen) < 0.8


def test_a_stream_goes_on_where_its_state_was_taken():
    def stream():
        return BatchStream(
            {"a": (Numbers(), 0.5), "b": (Numbers(1000), 0.5)}, tokens=25, block_size=4, seed=2
        )

    one = stream()
    for _ in range(5):
        one.next()
    other = stream()
    other.load(one.state())
    for _ in range(10):
        assert torch.equal(one.next().ids, other.next().ids)


def test_a_sample_over_the_budget_gets_a_batch_of_its_own():
    stream = BatchStream({"a": (Numbers(), 1.0)}, tokens=3, block_size=4, seed=0)
    batches = [stream.next() for _ in range(8)]
    assert [batch.ids.numel() for batch in batches] == [1, 8, 4, 11, 7, 3, 10, 6]
    assert all(batch.layout.page_table.shape[0] == 1 for batch in batches)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("steps = 3", "steps"),
        ("[schedule]\nstep = 3", "schedule.step"),
        ("[schedule]\nsteps = 'many'", "schedule.steps"),
        ("[data", "not valid TOML"),
        ("[schedule]\nlog_every = 0", "schedule.log_every"),
        ("[schedule]\nmtp_share = 1.5", "schedule.mtp_share"),
        ("[data]\nbackground_rows = 0.0", "data.background_rows"),
        ("[optimiser]\nclip = -1.0", "optimiser.clip"),
    ],
)
def test_a_wrong_config_gets_one_line_that_names_the_key(tmp_path, text, said):
    path = tmp_path / "run.toml"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        load_config(path)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_paths_in_a_config_are_relative_to_it(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text("[data]\ntexts = 'sources'\n[schedule]\nsteps = 3\n")
    config = load_config(path)
    assert config.data.texts == str(tmp_path / "sources") and config.schedule.steps == 3
