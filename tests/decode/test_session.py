"""Sessions: whatever is committed, tried, taken back or branched, scores equal the model's over whole prefixes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import BloomConfig, GPTNeoConfig, MptConfig

from tests.tiny_models import TINY, build, tiny_llama
from tokenloom.decode.session import ROOT, open_session
from tokenloom.decode.table import TableLM

PROMPTS = [[5, 9, 4, 7, 11], [2, 8], [3, 3, 3, 3, 6, 6, 12]]
# Sums of 16 to 64 terms of size up to 10 in another order, float32.
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def direct(model: Any, prefix: Sequence[int]) -> Tensor:
    with torch.no_grad():
        scores: Tensor = model(input_ids=torch.tensor([list(prefix)])).logits[0, -1]
    return scores


@pytest.mark.parametrize("name", sorted(TINY))
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_steps_trees_crops_and_branches_equal_the_model(name: str, attention: str) -> None:
    model = TINY[name](attention=attention)
    with open_session(model, PROMPTS) as session:
        torch.testing.assert_close(session.start(), torch.stack([direct(model, p) for p in PROMPTS]), **CLOSE)
        session.step(torch.tensor([4, 5, 6]))
        scores = session.extend([[7], [8, 9, 10], [11, 12]])
        torch.testing.assert_close(scores, torch.stack([direct(model, r) for r in session.rows]), **CLOSE)

        # Two branches below the root, one of them forking again; each row has another tree.
        tokens = torch.tensor([[20, 21, 22, 23, 24], [30, 31, 32, 33, 34], [40, 41, 42, 43, 44]])
        parents = torch.tensor([[ROOT, 0, 0, ROOT, 3], [ROOT, ROOT, 1, 2, 3], [ROOT, 0, 1, 2, ROOT]])
        tried = session.try_nodes(tokens, parents)
        for row, prefix in enumerate(session.rows):
            for node in range(5):
                path, at = [], node
                while at != ROOT:
                    path.insert(0, int(tokens[row, at]))
                    at = int(parents[row, at])
                torch.testing.assert_close(tried[row, node], direct(model, prefix + path), **CLOSE)

        session.accept([[0, 2], [1, 2, 3, 4], []])
        assert session.rows[0][-2:] == [20, 22]
        assert session.rows[1][-4:] == [31, 32, 33, 34]
        scores = session.step(torch.tensor([50, 51, 52]))
        torch.testing.assert_close(scores, torch.stack([direct(model, r) for r in session.rows]), **CLOSE)

        session.crop([6, 3, 9])
        session.branch([2, 0, 2, 1])
        scores = session.step(torch.tensor([13, 14, 15, 16]))
        assert [r[-1] for r in session.rows] == [13, 14, 15, 16]
        torch.testing.assert_close(scores, torch.stack([direct(model, r) for r in session.rows]), **CLOSE)


def test_the_same_prompt_is_read_once() -> None:
    model = tiny_llama()
    with open_session(model, [[4, 5], [4, 5], [6]]) as session:
        scores = session.start()
        assert torch.equal(scores[0], scores[1])
        scores = session.step(torch.tensor([7, 8, 9]))
        torch.testing.assert_close(scores, torch.stack([direct(model, r) for r in session.rows]), **CLOSE)


def test_embeddings_of_tokens_are_tokens() -> None:
    model = tiny_llama()
    with open_session(model, [[4, 5]]) as session:
        session.start()
        embedded = model.get_input_embeddings()(torch.tensor([7]))
        scores = session.step_embeddings(embedded, torch.tensor([7]))  # type: ignore[attr-defined]
        torch.testing.assert_close(scores[0], direct(model, [4, 5, 7]), **CLOSE)


def test_what_cannot_be_is_refused() -> None:
    model = tiny_llama()
    with pytest.raises(ValueError, match="at least one token"), open_session(model, [[]]):
        pass
    with open_session(model, [[4, 5]]) as session:
        session.start()
        with pytest.raises(ValueError, match="accept follows"):
            session.accept([[0]])
        with pytest.raises(ValueError, match="crop to"):
            session.crop([3])
        with pytest.raises(ValueError, match="at least one token for each"):
            session.extend([[]])


def test_a_model_goes_on_as_it_was() -> None:
    model = tiny_llama()
    model.train()
    with open_session(model, [[4, 5]]) as session:
        session.start()
        assert not model.training
    assert model.training


@pytest.mark.parametrize("name", ["bloom", "mpt", "gpt-neo"])
def test_models_that_count_columns_are_refused(name: str) -> None:
    """ALiBi and GPT-Neo's windows go by places in the input, whatever a mask says."""
    configs = {
        "bloom": BloomConfig(vocab_size=64, hidden_size=16, n_layer=2, n_head=2),
        "mpt": MptConfig(vocab_size=64, d_model=16, n_layers=2, n_heads=2, max_seq_len=128),
        "gpt-neo": GPTNeoConfig(
            vocab_size=64, hidden_size=16, num_layers=2, num_heads=2, attention_types=[[["global", "local"], 1]]
        ),
    }
    with (
        pytest.raises(ValueError, match="mask does not tell what they see"),
        open_session(build(configs[name]), [[3]]),
    ):
        pass


def test_parts_that_stood_in_evaluation_mode_stay_there() -> None:
    model = tiny_llama().train()
    frozen = model.model.layers[0].mlp.eval()
    with open_session(model, [[3, 4]]) as session:
        session.start()
    assert model.training
    assert model.model.layers[1].mlp.training
    assert not frozen.training
    assert "forward" not in model.model.layers[0].mlp.__dict__


def test_tables_behave_as_models_do() -> None:
    table = TableLM.random(4)
    with open_session(table, [[0], [1, 2]]) as session:
        assert torch.equal(session.start()[1], table.probs([1, 2]).log())
        tried = session.try_nodes(torch.tensor([[3, 2], [1, 0]]), torch.tensor([[ROOT, 0], [ROOT, ROOT]]))
        assert torch.equal(tried[0, 1], table.probs([0, 3, 2]).log())
        assert torch.equal(tried[1, 1], table.probs([1, 2, 0]).log())
        session.accept([[0, 1], []])
        assert session.rows == [[0, 3, 2], [1, 2]]
    law = table.string_law([0], 3)
    assert sum(law.values()) == pytest.approx(1.0, abs=1e-12)
    assert law[1, 2, 3] == pytest.approx(
        float(table.probs([0])[1] * table.probs([0, 1])[2] * table.probs([0, 1, 2])[3])
    )


def test_sessions_of_one_model_close_in_any_order() -> None:
    model = tiny_llama()
    first, second = open_session(model, [[4, 5]]), open_session(model, [[6, 7]])
    first.__enter__().start()
    session = second.__enter__()
    session.start()
    first.__exit__(None, None, None)
    torch.testing.assert_close(session.step(torch.tensor([8]))[0], direct(model, [6, 7, 8]), **CLOSE)
    second.__exit__(None, None, None)
    assert not any("forward" in module.__dict__ for module in model.modules())
    assert torch.is_grad_enabled()
