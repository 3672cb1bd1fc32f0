"""`Signals` and the registry of chunk signals."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tokenloom import Signals, chunk_signal, get_part, part
from tokenloom.signals import CHUNK_SIGNALS


def test_rows_cut_extras_too_and_keep_absent_ones_absent() -> None:
    extra = torch.arange(12.0).reshape(3, 2, 2)
    s = Signals(logprobs=torch.arange(6.0).reshape(3, 2), extras={"mine": extra}).rows([2, 0])
    assert s.logprobs is not None
    assert s.logprobs.tolist() == [[4, 5], [0, 1]]
    assert s.extras["mine"].tolist() == extra[[2, 0]].tolist()
    assert s.entropies is None
    assert set(s.named()) == {"logprobs", "mine"}


def test_detach_drops_gradients_everywhere() -> None:
    leaf = torch.zeros(1, 1, requires_grad=True)
    s = Signals(logprobs=leaf * 2, extras={"mine": leaf * 3}).detach()
    assert not any(v.requires_grad for v in s.named().values())


def test_rows_keep_gradients() -> None:
    leaf = torch.zeros(3, 1, requires_grad=True)
    cut = Signals(logprobs=leaf).rows([1]).logprobs
    assert cut is not None
    cut.sum().backward()
    assert leaf.grad is not None
    assert leaf.grad.tolist() == [[0], [1], [0]]


def test_replace_sends_unknown_names_to_extras_and_leaves_the_original() -> None:
    s = Signals(extras={"a": torch.zeros(1, 1)})
    changed = s.replace(logprobs=torch.ones(1, 1), b=torch.ones(1, 1))
    assert set(changed.named()) == {"logprobs", "a", "b"}
    assert set(s.named()) == {"a"}
    assert changed.replace(logprobs=None).logprobs is None


def test_a_chunk_signal_becomes_a_vocabulary_name() -> None:
    @chunk_signal("top_logit", "logits")
    def top_logit(logits: Tensor) -> Tensor:
        return logits.max(-1).values

    @part("test/reads-it", stage="term", scope="token", paper="none")
    def reads_it(top_logit: Tensor, mask: Tensor) -> Tensor:
        return torch.where(mask, top_logit, torch.zeros_like(top_logit))

    assert get_part("test/reads-it").inputs == {"top_logit": True, "mask": True}
    assert CHUNK_SIGNALS["top_logit"].inputs == ("logits",)
    assert top_logit(torch.tensor([[1.0, 3.0]])).tolist() == [3.0]


@pytest.mark.parametrize("name", ["logprobs", "mask", "advantages", "full_ref_kl"])
def test_a_name_with_a_meaning_cannot_be_taken(name: str) -> None:
    with pytest.raises(ValueError, match=f"the signal name '{name}' is taken"):

        @chunk_signal(name, "logits")
        def other(logits: Tensor) -> Tensor:
            return logits.sum(-1)


def test_the_same_definition_may_register_again(tmp_path: Path) -> None:
    for _ in range(2):

        @chunk_signal("again", "logits")
        def again(logits: Tensor) -> Tensor:
            return logits.sum(-1)
