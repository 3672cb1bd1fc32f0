"""OPERA on models: beam search in the limit, penalties recomputed from whole forwards, returns that restore."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.decode.table_runs import table_run
from tests.tiny_models import TINY, tiny_llama
from tokenloom import decode
from tokenloom.decode.opera import Opera
from tokenloom.decode.table import TableLM
from tokenloom.methods.decoding.opera import over_trust

IDS = torch.tensor([[2, 2, 5, 9, 4], [2, 8, 3, 11, 6], [7, 7, 7, 9, 9]])
MASK = torch.tensor([[0, 0, 1, 1, 1], [0, 1, 1, 1, 1], [1, 1, 1, 1, 1]])


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "gpt2"])
@pytest.mark.parametrize("length_penalty", [1.0, 0.0])
def test_without_penalty_it_is_beam_search(name: str, length_penalty: float) -> None:
    model = TINY[name](seed=3, attention="eager")
    given: dict[str, Any] = {"attention_mask": MASK, "do_sample": False, "max_new_tokens": 9}
    theirs = model.generate(IDS, num_beams=3, length_penalty=length_penalty, **given)
    loop = decode.loop("opera", beams=3, candidates=64, alpha=0.0, patience=1000, length_penalty=length_penalty)
    assert torch.equal(model.generate(IDS, custom_generate=loop, **given), theirs)


def test_one_beam_and_one_candidate_is_greedy() -> None:
    model = tiny_llama(seed=4, attention="eager")
    given: dict[str, Any] = {"attention_mask": MASK, "do_sample": False, "max_new_tokens": 12}
    loop = decode.loop("opera", beams=1, candidates=1, patience=1000)
    assert torch.equal(model.generate(IDS, custom_generate=loop, **given), model.generate(IDS, **given))


def endless(model: Any) -> Any:
    model.generation_config.eos_token_id = None
    return model


def attention(model: Any, ids: list[int]) -> torch.Tensor:
    """Maximum over heads of the last layer, rows normalized, [S, S]."""
    with torch.no_grad():
        weights = model(input_ids=torch.tensor([ids]), output_attentions=True).attentions[-1][0].double().amax(0)
    return weights / weights.sum(-1, keepdim=True)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_penalties_equal_those_of_whole_forwards(name: str) -> None:
    """One beam: each step takes the best of its candidates by logit less penalty."""
    model = endless(TINY[name](seed=5, attention="eager"))
    given: dict[str, Any] = {"attention_mask": MASK, "do_sample": False, "max_new_tokens": 16}
    settings: dict[str, Any] = {"alpha": 3.0, "scale": 30.0}
    loop = decode.loop("opera", beams=1, candidates=4, patience=1000, span_end=2, **settings)
    ours = model.generate(IDS, custom_generate=loop, **given)[:, 5:].tolist()
    changed = 0
    for row in range(3):
        ids = IDS[row][MASK[row].bool()].tolist()
        start = len(ids)
        for step, token in enumerate(ours[row]):
            with torch.no_grad():
                scores = model(input_ids=torch.tensor([ids])).logits[0, -1].double()
            values = {}
            for candidate in scores.topk(4).indices.tolist():
                seen = attention(model, [*ids, candidate])
                log_trust, _ = over_trust(seen[start:, start:], scale=30.0)
                cost = -float(seen[-1, :2].sum()) if step < 10 else float(log_trust.exp())
                values[candidate] = float(scores[candidate]) - 3.0 * cost
            assert token == max(values, key=values.__getitem__)
            changed += token != int(scores.argmax())
            ids.append(token)
    assert changed > 0


class Watched(Opera):
    """Keeps the searches' states whenever one is taken up."""

    def _step(self, run: Any, number: int, session: Any, scores: Any, state: Any) -> Any:
        self.seen.append((number, [(b.ids, b.score) for b in state.beams], [set(e) for e in state.excluded], scores))
        return super()._step(run, number, session, scores, state)


def test_a_return_restores_tokens_and_scores_and_excludes_what_was_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    def always_twelve(block: torch.Tensor, *, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
        return over_trust(block, scale=scale)[0], torch.full((len(block),), min(12, block.shape[-1] - 1))

    monkeypatch.setattr("tokenloom.decode.opera.over_trust", always_twelve)
    model = endless(tiny_llama(seed=6, attention="eager"))
    loop = Watched(beams=2, candidates=3, patience=2)
    loop.seen = []
    given: dict[str, Any] = {"attention_mask": MASK, "do_sample": False, "max_new_tokens": 30}
    ids = model.generate(IDS, custom_generate=loop, **given)
    assert ids.shape == (3, 35)
    # Three times (the number of candidates) behind 12, as often behind 11 and 10; then it goes on.
    assert loop.last_run.counts["returns"] == 3 * 9
    returns = 0
    for (number, beams, excluded, scores), (then, after, _, _) in zip(loop.seen, loop.seen[1:], strict=False):
        for row, (said, _) in enumerate(beams):
            with torch.no_grad():
                prefix = [*IDS[number][MASK[number].bool()].tolist(), *said]
                direct = model(input_ids=torch.tensor([prefix])).logits[0, -1]
            torch.testing.assert_close(scores[row], direct, rtol=1e-4, atol=1e-4)
        if then == number and len(after[0][0]) <= len(beams[0][0]):
            returns += 1
            earlier = [s for s in loop.seen if s[0] == number and len(s[1][0][0]) == len(after[0][0])]
            assert any(s[1] == after for s in earlier[:-1])
            assert len(after[0][0]) >= 11
        if any(excluded) and then == number and len(after[0][0]) > len(beams[0][0]):
            for said, _ in after:
                parent = next(r for r, b in enumerate(beams) if said[:-1] == b[0])
                assert said[-1] not in excluded[parent]
    assert returns == loop.last_run.counts["returns"]


def test_what_processors_forbid_fills_no_beam() -> None:
    model = endless(tiny_llama(seed=6, attention="eager"))
    forbidden = set(range(32))
    loop = Watched(beams=4, candidates=1)  # three of the first four beams are no candidates
    loop.seen = []
    model.generate(IDS, attention_mask=MASK, do_sample=False, max_new_tokens=5, custom_generate=loop,
                   suppress_tokens=sorted(forbidden))  # fmt: skip
    said = {token for _, beams, _, _ in loop.seen for ids, _ in beams for token in ids}
    assert said
    assert not said & forbidden


def test_a_return_that_leaves_nothing_else_says_the_same_again(monkeypatch: pytest.MonkeyPatch) -> None:
    def always_twelve(block: torch.Tensor, *, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
        return over_trust(block, scale=scale)[0], torch.full((len(block),), min(12, block.shape[-1] - 1))

    def only_nine(_: Any, scores: torch.Tensor) -> torch.Tensor:
        return torch.full_like(scores, -torch.inf).index_fill(-1, torch.tensor([9]), 0.0)

    monkeypatch.setattr("tokenloom.decode.opera.over_trust", always_twelve)
    model = endless(tiny_llama(seed=6, attention="eager"))
    loop = decode.loop("opera", beams=2, candidates=3, patience=2)
    ids = model.generate(
        IDS[2:], do_sample=False, max_new_tokens=20, custom_generate=loop, logits_processor=[only_nine]
    )
    assert ids[0, 5:].tolist() == [9] * 20
    assert loop.last_run.counts["returns"] > 0


def test_among_equals_the_lowest_id_is_a_candidate() -> None:
    def leveled(_: Any, scores: torch.Tensor) -> torch.Tensor:
        return scores.sign()  # more are equal than there are candidates

    model = endless(tiny_llama(attention="eager"))
    given: dict[str, Any] = {"attention_mask": MASK, "do_sample": False, "max_new_tokens": 8}
    theirs = model.generate(IDS, logits_processor=[leveled], **given)
    loop = decode.loop("opera", beams=1, candidates=5, alpha=0.0)
    assert torch.equal(model.generate(IDS, custom_generate=loop, logits_processor=[leveled], **given), theirs)


def test_any_attention_is_taken_and_given_back() -> None:
    given: dict[str, Any] = {"attention_mask": MASK, "do_sample": False, "max_new_tokens": 14}
    model, loop = tiny_llama(seed=5), decode.loop("opera", beams=2, candidates=3, scale=30.0)
    found = model.generate(IDS, custom_generate=loop, **given)
    assert torch.equal(found, tiny_llama(seed=5, attention="eager").generate(IDS, custom_generate=loop, **given))
    assert model.config._attn_implementation == "sdpa"

    def broken(_: Any, scores: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        model.generate(IDS, custom_generate=loop, logits_processor=[broken], **given)
    assert model.config._attn_implementation == "sdpa"


def test_refusals() -> None:
    given: dict[str, Any] = {"attention_mask": MASK, "max_new_tokens": 3, "custom_generate": decode.loop("opera")}
    with pytest.raises(ValueError, match="has none to hand out"):
        decode.loop("opera").rows(table_run(TableLM.random(3), sample=False))

    fixed = tiny_llama()
    fixed.set_attn_implementation = lambda kind: None  # as of models whose code knows one attention only
    with pytest.raises(ValueError, match="load the model with attn_implementation='eager'"):
        fixed.generate(IDS, do_sample=False, **given)

    def nothing(_: Any, scores: torch.Tensor) -> torch.Tensor:
        return torch.full_like(scores, -torch.inf)

    with pytest.raises(ValueError, match="leave no token"):
        tiny_llama().generate(IDS, do_sample=False, logits_processor=[nothing], **given)
    with pytest.raises(ValueError, match="do_sample=False"):
        tiny_llama(attention="eager").generate(IDS, do_sample=True, **given)
    with pytest.raises(ValueError, match="beams"):
        decode.loop("opera", beams=0)
    for settings in ({"scale": 0.0}, {"alpha": -1.0}):
        with pytest.raises(ValueError, match="alpha must be 0 or more and scale above 0"):
            decode.loop("opera", **settings)
