"""The prefix cache changes how much is computed and nothing else."""

from pathlib import Path

import pytest
import torch

from longforge.engine import Engine, GenerationRequest, RequestFailed
from longforge.engine.page_mover import TierSettings
from longforge.model import CausalLM
from longforge.protocol import SamplingParams
from small_engine import GREEDY, ids, one, run, tokens
from small_model import small_model

MIXTURES = pytest.mark.parametrize("mixture", ["sparse", "sliding", "lightning"])


@MIXTURES
@pytest.mark.parametrize("drafts", [0, 2])
def test_every_hit_length_around_every_page_boundary_gives_the_same_bytes(mixture: str, drafts: int):
    if mixture == "lightning" and drafts:
        pytest.skip("a model with lightning layers does not draft")
    model = small_model(mixture)
    block = model.config.block_size
    first = tokens(4 * block + 1, 1)
    for shared in range(1, len(first) + 1):
        engine = Engine(model, pages=40, max_running=2, drafts=drafts)
        one(engine, first)
        prompt = first[:shared] + tokens(5, 2)
        hit = one(engine, prompt)
        cold = one(Engine(model, pages=40, max_running=2, prefix_cache=False), prompt)
        assert ids(hit) == ids(cold), f"{shared} tokens shared"
        assert hit[0].cached_tokens == shared // block * block
        torch.testing.assert_close([e.logprob for e in hit], [e.logprob for e in cold], atol=1e-5, rtol=0)


@MIXTURES
def test_a_whole_prompt_in_the_cache_still_computes_its_last_page(mixture: str):
    engine = Engine(small_model(mixture), pages=40)
    prompt = tokens(16, 3)
    cold, hit = one(engine, prompt), one(engine, prompt)
    assert ids(cold) == ids(hit) and hit[0].cached_tokens == 12 and cold[0].cached_tokens == 0
    assert engine.stats().prefix_hit_tokens == 12 and engine.stats().prefix_queried_tokens == 32


def test_the_next_turn_finds_the_answer_of_the_last_one_too():
    engine = Engine(small_model(), pages=40, drafts=3)
    prompt = tokens(6, 3)
    answer = one(engine, prompt, SamplingParams(max_tokens=11, temperature=0.0))
    following = (*prompt, *ids(answer), *tokens(3, 4))
    hit = one(engine, following)
    assert hit[0].cached_tokens == 16
    assert ids(hit) == ids(one(Engine(small_model(), pages=40), following))


def test_tenants_share_nothing_and_a_request_may_stay_outside():
    engine, prompt = Engine(small_model(), pages=60), tokens(17, 3)
    assert one(engine, prompt, tenant="a")[0].cached_tokens == 0
    assert one(engine, prompt, tenant="b")[0].cached_tokens == 0
    assert one(engine, prompt, tenant="a")[0].cached_tokens == 16
    assert one(engine, prompt, tenant="a", cache=False)[0].cached_tokens == 0
    assert one(engine, prompt, cache=False)[0].cached_tokens == 0
    assert one(engine, prompt)[0].cached_tokens == 0


def test_pages_of_old_weights_never_match_again_not_even_those_of_who_still_runs():
    model, prompt = small_model(), tokens(17, 3)
    engine = Engine(model, pages=60)
    one(engine, prompt)
    engine.submit(GenerationRequest("running", prompt, SamplingParams(max_tokens=30, temperature=0.0)))
    for _ in range(3):
        engine.step()
    new = small_model(seed=1)
    engine.swap_weights(new.state_dict(), 1)
    engine.check_pages()
    while engine.has_work:
        engine.step()
    fresh = one(engine, prompt)
    assert fresh[0].cached_tokens == 0
    assert ids(fresh) == ids(one(Engine(new, pages=40), prompt))


def test_who_comes_back_after_preemption_says_what_it_would_have_said():
    model = small_model()
    asked = [
        GenerationRequest(str(i), tokens(9 + i, i), SamplingParams(max_tokens=30, temperature=0.8, seed=i))
        for i in range(6)
    ]
    for drafts in (0, 2):
        tight = Engine(model, pages=24, max_running=6, max_batch_tokens=16, drafts=drafts)
        answers = run(tight, *asked)
        assert tight.stats().preemptions > 0
        for request in asked:
            alone = one(Engine(model, pages=24), request.prompt_ids, request.params)
            assert ids(answers[request.id]) == ids(alone)


def test_draft_keys_of_a_found_page_are_those_that_would_have_been_computed():
    model = small_model()
    block, layer = model.config.block_size, len(model.config.layers)
    shared = tokens(3 * block, 5)

    def draft_keys(before: tuple[int, ...] | None) -> torch.Tensor:
        engine = Engine(model, pages=30, drafts=1, max_batch_tokens=64)
        if before is not None:  # leaves pages whose next token was another one
            one(engine, (*shared, *before), SamplingParams(max_tokens=1))
        prompt = (*shared, *tokens(block, 6))
        engine.submit(GenerationRequest("one", prompt, SamplingParams(max_tokens=20)))
        engine.step()
        sequence = engine._scheduler.running[0]
        assert sequence.cached_tokens == (0 if before is None else 3 * block)
        keys = [pool[layer][sequence.pages[:4]] for pool in (engine._runner.cache.k, engine._runner.cache.v)]
        return torch.stack([engine_keys for engine_keys in keys if engine_keys is not None])

    cold = draft_keys(None)
    for seed in (7, 8):
        torch.testing.assert_close(draft_keys(tokens(5, seed)), cold, atol=1e-5, rtol=0)


def test_a_broken_request_leaves_the_others_unharmed_and_its_pages_clean():
    model = small_model()
    with torch.no_grad():
        model.model.embed_tokens.weight[7] = torch.nan
    engine = Engine(model, pages=12, max_running=3, prefix_cache=False)
    fine = [p for p in (tokens(10, 1), tokens(11, 2), tokens(9, 3)) if 7 not in p]
    expected = [ids(one(Engine(model, pages=12), prompt)) for prompt in fine]
    for _ in range(3):
        engine.submit(GenerationRequest("broken", (3, 7, 3, 7, 3), GREEDY))
        for i, prompt in enumerate(fine):
            engine.submit(GenerationRequest(str(i), prompt, GREEDY))
        said: dict[str, list[int]] = {}
        failures = []
        while engine.has_work:
            for event in engine.step():
                if isinstance(event, RequestFailed):
                    failures.append(event)
                else:
                    said.setdefault(event.request_id, []).append(event.token_id)
            engine.check_pages()
        assert [failure.request_id for failure in failures] == ["broken"]
        assert [said[str(i)] for i in range(len(fine))] == expected


@pytest.mark.parametrize("drafts", [0, 2])
def test_a_broken_prompt_whose_log_probabilities_are_asked_for_ends_alone(drafts: int):
    model = small_model()
    with torch.no_grad():
        model.model.embed_tokens.weight[7] = torch.nan
    engine = Engine(model, pages=30, max_running=2, max_batch_tokens=6, drafts=drafts)
    fine = tuple(token for token in tokens(10, 1) if token != 7)
    expected = ids(one(engine, fine))
    judged = SamplingParams(max_tokens=4, prompt_logprobs=1)
    engine.submit(GenerationRequest("broken", (3, 7, *tokens(20, 2)), judged))
    engine.submit(GenerationRequest("fine", fine, GREEDY))
    events = []
    while engine.has_work:
        events += engine.step()
        engine.check_pages()
    failures = [event for event in events if isinstance(event, RequestFailed)]
    assert [failure.request_id for failure in failures] == ["broken"]
    assert [event.token_id for event in events if not isinstance(event, RequestFailed)] == expected


@pytest.mark.parametrize("settings", ["host", "files"])
def test_evicted_pages_come_back_from_the_slower_tiers(settings: str, tmp_path: Path):
    tiers = TierSettings(2**20) if settings == "host" else TierSettings(folder=tmp_path / "pages")
    model, prompt = small_model(), tokens(25, 3)
    engine = Engine(model, pages=10, tiers=tiers, drafts=1)
    expected = ids(one(engine, prompt))
    for seed in range(5):  # push it out of the pool
        one(engine, tokens(25, 10 + seed))
    assert engine._mover is not None
    engine._mover._tiers.flush()
    again = one(engine, prompt)
    assert ids(again) == expected and again[0].cached_tokens == 24
    engine.close()


def test_two_engines_share_a_folder_by_weights_and_tenant_and_damage_is_a_miss(tmp_path: Path):
    def engine(model: CausalLM) -> Engine:
        return Engine(model, pages=30, tiers=TierSettings(folder=tmp_path / "pages"))

    prompt = tokens(25, 3)
    first = engine(small_model())
    expected = ids(one(first, prompt, tenant="a"))
    first.close()
    second = engine(small_model())
    hit = one(second, prompt, tenant="a")
    assert ids(hit) == expected and hit[0].cached_tokens == 24
    assert one(second, prompt, tenant="b")[0].cached_tokens == 0
    assert one(engine(small_model(seed=1)), prompt, tenant="a")[0].cached_tokens == 0
    second.close()
    records = sorted(p for p in (tmp_path / "pages").rglob("*") if len(p.name) == 64)
    for record in records:
        damaged = bytearray(record.read_bytes())
        damaged[len(damaged) // 2] ^= 1
        record.write_bytes(damaged)
    third = one(engine(small_model()), prompt, tenant="a")
    assert ids(third) == expected and third[0].cached_tokens == 0


def test_log_probabilities_of_the_prompt_are_the_models():
    model, prompt = small_model(), tokens(23, 3)
    engine = Engine(model, pages=40, max_batch_tokens=7, max_running=2)
    one(engine, prompt)  # what is cached must not shorten the list
    params = SamplingParams(max_tokens=2, temperature=0.0, prompt_logprobs=3)
    events = one(engine, prompt, params)
    judged = events[0].prompt
    assert judged[0] is None and len(judged) == len(prompt) and events[1].prompt == ()
    with torch.no_grad():
        full = torch.log_softmax(model(torch.tensor([prompt]))[0], dim=-1)
    for place, entry in enumerate(judged[1:]):
        assert entry is not None and entry.token_id == prompt[place + 1]
        assert entry.logprob == pytest.approx(float(full[place, entry.token_id]), abs=1e-5)
        assert [t for t, _ in entry.top_logprobs] == full[place].sort(descending=True, stable=True)[1][
            :3
        ].tolist()


def test_selected_blocks_are_told_to_who_asks():
    model, prompt = small_model(), tokens(40, 3)
    config = model.config
    engine = Engine(model, pages=40)
    answers = run(
        engine,
        GenerationRequest("asks", prompt, GREEDY, report_blocks=True),
        GenerationRequest("does not", prompt, GREEDY),
    )
    groups = config.kv_heads * sum(layer.mixer == "sparse" for layer in config.layers)
    for place, event in enumerate(answers["asks"]):
        own = (len(prompt) + place - 1) // config.block_size
        assert sum(event.blocks) == groups * config.top_k_blocks
        assert len(event.blocks) == own + 1 and event.blocks[own] == groups
    assert all(event.blocks == () for event in answers["does not"])
