"""Token alignment under `generate`: a loop that takes prompt tokens back, and the shaper that it is made of.

model.generate(**inputs, custom_generate=decode.loop("token-alignment", tokenizer=tokenizer))
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor

from tokenloom.decode.registry import decoder
from tokenloom.decode.run import Loop, Run
from tokenloom.decode.token_bytes import ByteVocabulary
from tokenloom.methods.decoding.locally_constrained import locally_constrained
from tokenloom.methods.decoding.token_alignment import after_token, taken_back


@decoder("token-alignment", kind="shaper")
class TokenAlignmentShaper(LogitsProcessor):
    """Masks tokens that do not write the bytes taken back from the prompt.

    `removed`: the bytes of each row (repeated for each of its beams or samples); `prompt_length`: columns of the prompt
    without them. `methods.decoding.token_alignment.taken_back` gives both.
    """

    def __init__(self, tokenizer: Any, removed: Any, prompt_length: int) -> None:
        self.vocabulary = tokenizer if isinstance(tokenizer, ByteVocabulary) else ByteVocabulary(tokenizer)
        self.removed: list[bytes] = list(removed)
        self.prompt_length = prompt_length

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if input_ids.shape[0] % len(self.removed):
            raise ValueError(
                f"token-alignment: {input_ids.shape[0]} rows cannot come from {len(self.removed)} prompts; "
                "give the bytes removed from each"
            )
        copies = input_ids.shape[0] // len(self.removed)
        keep = torch.ones_like(scores, dtype=torch.bool)
        for row, ids in enumerate(input_ids[:, self.prompt_length :].tolist()):
            remaining = self.remaining(self.removed[row // copies], ids)
            if remaining:
                keep[row] = self._allowed(remaining, scores.shape[-1]).to(scores.device)
        return locally_constrained(scores, keep)

    def remaining(self, removed: bytes, generated: Sequence[int]) -> bytes:
        """What is left of `removed` after the generated tokens."""
        for token in generated:
            if not removed:
                break
            removed = after_token(removed, self.vocabulary.pieces[token] or b"")
        return removed

    def _allowed(self, remaining: bytes, size: int) -> Tensor:
        # The trie's form of the rule `aligned`.
        keep = torch.zeros(size, dtype=torch.bool)
        compatible = self.vocabulary.trie.compatible(remaining)[:size]
        keep[: len(compatible)] = compatible
        return keep


@decoder("token-alignment", kind="loop")
class TokenAlignment(Loop):
    """Decoding that starts `backtrack` tokens before the prompt's end and writes the prompt's text again first.

    What comes back are the prompt's ids as given and new ids whose text goes on with it: bytes that the last aligned
    token wrote beyond the prompt become tokens of their own. 1 is token healing; the paper takes up to 3.
    """

    unmasked = "writes the prompt's end again"

    def __init__(self, tokenizer: Any, *, backtrack: int = 1) -> None:
        if backtrack < 0:
            raise ValueError(f"token-alignment: backtrack must be at least 0, got {backtrack}")
        self.vocabulary = ByteVocabulary(tokenizer)
        self.backtrack = backtrack

    def rows(self, run: Run) -> list[list[int]]:
        """See `Loop`."""
        pairs = [taken_back(p, self.vocabulary.pieces, backtrack=self.backtrack) for p in run.prompts]
        inner = self._without(run, [kept for kept, _ in pairs])
        shaper = TokenAlignmentShaper(self.vocabulary, [removed for _, removed in pairs], inner.input_ids.shape[1])
        generated: list[list[int]] = [[] for _ in pairs]
        results: list[list[int]] = [[] for _ in pairs]
        live = list(range(len(pairs)))
        with inner.session() as session:
            scores = session.start()
            while True:
                chosen = self._choose(inner, shaper, live, generated, scores)
                running = []
                for place, (row, token) in enumerate(zip(live, chosen, strict=True)):
                    before = shaper.remaining(shaper.removed[row], generated[row])
                    generated[row].append(token)
                    piece = self.vocabulary.pieces[token] if token < len(self.vocabulary.pieces) else None
                    new = self.vocabulary.encode_bytes((piece or b"")[len(before) :]) if before else [token]
                    kept, stopped = run.until_stop(row, results[row], new)
                    results[row] += kept
                    run.stream(row, kept)
                    if not stopped:
                        running.append(place)
                if not running:
                    return results
                if len(running) < len(live):
                    session.branch(running)
                live = [live[i] for i in running]
                scores = session.step(torch.tensor([chosen[i] for i in running]))

    @staticmethod
    def _without(run: Run, prompts: list[list[int]]) -> Run:
        width = max(map(len, prompts))
        padded = [[run.pad] * (width - len(p)) + p for p in prompts]
        ids = torch.tensor(padded, dtype=run.input_ids.dtype, device=run.input_ids.device)
        return replace(run, input_ids=ids, prompts=prompts)

    @staticmethod
    def _choose(
        run: Run, shaper: TokenAlignmentShaper, live: list[int], generated: list[list[int]], scores: Tensor
    ) -> list[int]:
        """As `Run.choose`, with the mask before all other processors."""
        masked = scores.clone()
        for place, row in enumerate(live):
            remaining = shaper.remaining(shaper.removed[row], generated[row])
            if remaining:
                keep = shaper._allowed(remaining, scores.shape[-1]).to(scores.device)
                masked[place] = locally_constrained(scores[place][None], keep[None])[0]
        return run.choose(live, [generated[r] for r in live], masked)
