"""The family is complete: every slug of its sheet has parts, a page's text, and a way to be called."""

from __future__ import annotations

import inspect

import pytest

from tokenloom import catalog, decode

SHEET = [
    "meta-generation", "awrs", "set-cover-pruning", "soft-thinking", "unbiased-next-character",
    "plugin-reweighting", "two-step-multi-draft", "difficulty-probe", "byte-level-probabilities", "uid-decoding",
    "tree-bon", "sdsat", "nado", "fim-se", "token-alignment", "basis-aware-truncation", "rectification", "rad",
    "cards", "token-recycling", "r2r", "rmod", "skipdecode", "spec-tr", "cntp", "top-h",
    "distortion-free-watermark", "icn", "ariel", "locally-typical", "cipher", "cyclicreflex", "grad", "caad",
    "clue", "opera", "antislop", "vista", "diffadapt", "stand", "mcq-text-answers", "split-steering", "treeranker",
    "pride", "context-cutoff",
]  # fmt: skip
BASELINES = [
    "temperature", "top-k", "top-p", "min-p", "epsilon-sampling", "eta-sampling", "beam-search",
    "contrastive-decoding", "speculative-sampling", "prompt-lookup", "self-consistency", "best-of-n",
    "recursive-rejection", "locally-constrained", "green-list-watermark",
]  # fmt: skip
# Used as functions on answers, states, texts or prompts, not through `generate`.
FUNCTIONS = {
    "clue", "fim-se", "icn", "mcq-text-answers", "meta-generation", "pride", "treeranker", "unbiased-next-character",
}  # fmt: skip


def test_there_are_as_many_as_the_issue_says() -> None:
    assert len(SHEET) == 45
    assert len(BASELINES) == 15


@pytest.mark.parametrize("slug", SHEET + BASELINES)
def test_a_slug_has_parts_and_words(slug: str) -> None:
    method = catalog.methods()[slug]
    assert method.family == "decoding"
    assert "Fidelity" in method.document
    for part in method.parts:
        assert inspect.getdoc(part.function)
        assert part.stage in catalog.DECODING_STAGES


def test_what_runs_in_generate_is_built_by_name() -> None:
    built = set(decode.decoders("shaper")) | set(decode.decoders("loop"))
    assert set(SHEET + BASELINES) - built == FUNCTIONS
