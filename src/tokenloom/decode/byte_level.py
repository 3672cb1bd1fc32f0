"""Byte-level decoding: next-byte laws of a token model, and a loop that writes text byte by byte.

    next_byte_probabilities(model, tokenizer, "def f(x): retu")   # [257], as if the prompt did not end inside a token

Models with different tokenizers meet at the byte: `others=[(model, tokenizer), ...]` averages their laws.
"""

from __future__ import annotations

import codecs
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
from torch import Tensor

from tokenloom.decode.registry import decoder
from tokenloom.decode.run import Loop, Run
from tokenloom.decode.session import Session, open_session
from tokenloom.decode.token_bytes import ByteVocabulary
from tokenloom.methods.decoding.byte_level_probabilities import END, Cover, SortedTokens, mean_law, next_byte_law

Mode = Literal["canonical", "all"]
_BLANKS = b" \t\r\n"


class ByteTokens:
    """What byte-level decoding needs of a tokenizer: its bytes, sorted, and which sequences it would write itself."""

    def __init__(self, tokenizer: Any, size: int | None = None) -> None:
        self.vocabulary = ByteVocabulary(tokenizer, size)
        self.pieces = self.vocabulary.pieces
        self.sorted = SortedTokens(self.pieces)

    def split(self, ids: Sequence[int]) -> int:
        """Where the last word begins (a blank and more, after something else), which no token reaches over; or 0."""
        for i in range(len(ids) - 1, 0, -1):
            piece, before = self.pieces[ids[i]] or b"", self.pieces[ids[i - 1]]
            if (
                len(piece) > 1
                and piece[:1] == b" "
                and piece[1] not in _BLANKS
                and before
                and before[-1] not in _BLANKS
            ):
                return i
        return 0

    def canonical(self, sequences: Sequence[Sequence[int]]) -> list[bool]:
        """Whether the tokenizer writes the text of each sequence as just these tokens; unfinished characters pass."""
        tails = [list(ids[self.split(ids) :]) for ids in sequences]
        texts: list[str | None] = []
        for tail in tails:
            data = self.vocabulary.decode(tail)
            try:
                texts.append(data.decode())
            except UnicodeDecodeError:
                texts.append(None)
        whole = {t for t in texts if t is not None}
        # SentencePiece writes the blank before the first word itself.
        asked = sorted(whole | {t[1:] for t in whole if self.vocabulary.leading_blank and t.startswith(" ")})
        encoded = self.vocabulary.tokenizer(asked, add_special_tokens=False)["input_ids"] if asked else []
        known = {text: list(ids) for text, ids in zip(asked, encoded, strict=True)}
        return [
            text is None or known[text] == tail or (text.startswith(" ") and known.get(text[1:]) == tail)
            for text, tail in zip(texts, tails, strict=True)
        ]


class ByteState:
    """A model behind a text that grows byte by byte; use `open_bytes`."""

    def __init__(
        self,
        session: Session,
        tokens: ByteTokens,
        anchor: Sequence[int],
        eos: Collection[int],
        mode: Mode,
        prune: float,
        tail: float,
    ) -> None:
        self._session, self._tokens, self._eos = session, tokens, sorted(eos)
        self._anchor = tuple(anchor)
        self._mode, self._prune, self._tail = mode, prune, tail
        self._context = len(session.rows[0])
        self._row: dict[tuple[int, ...], int] = {(): 0}
        self.cover = Cover(tokens.sorted)
        self._continue([((), 1.0)], session.start())

    def law(self) -> Tensor:
        """[257]: of the next byte and the end."""
        return next_byte_law(self.cover.masses())

    def advance(self, byte: int) -> None:
        """Append a byte.

        Raises:
            ValueError: when the model gives it no probability.
        """
        self.cover.advance(byte, self._valid if self._mode == "canonical" else None, self._prune)
        branches, fresh = self.cover.branches, self.cover.fresh
        if not branches and not fresh:
            raise ValueError(
                f"byte-level-probabilities: the model cannot write {bytes([byte])!r} here (mode {self._mode!r})"
            )
        if not fresh:
            return
        # Every row takes a token; those that only wait give theirs back.
        waiting = [b.ids for b in branches]
        self._session.branch([self._row[ids] for ids in waiting] + [self._row[ids[:-1]] for ids, _ in fresh])
        scores = self._session.extend([[0]] * len(waiting) + [[ids[-1]] for ids, _ in fresh])
        rows = waiting + [ids for ids, _ in fresh]
        if waiting:
            self._session.crop([self._context + len(ids) for ids in rows])
        self._row = {ids: n for n, ids in enumerate(rows)}
        self._continue(fresh, scores[len(waiting) :])

    def _continue(self, sequences: Sequence[tuple[tuple[int, ...], float]], scores: Tensor) -> None:
        for (ids, probability), row in zip(sequences, scores, strict=True):
            law = row.double().cpu().softmax(-1)
            if self._mode == "canonical":
                law = self._masked(ids, law)
            self.cover.add(ids, probability, law, self._eos)

    def _masked(self, ids: tuple[int, ...], law: Tensor) -> Tensor:
        """`law` without tokens that the tokenizer would not write here, as far as they carry mass."""
        ranked, order = law.sort(descending=True, stable=True)
        count = int((ranked.cumsum(0) - ranked < 1 - self._tail).sum()) if self._tail else len(law)
        tried = [t for t in order[:count].tolist() if t < len(self._tokens.pieces) and self._tokens.pieces[t]]
        fine = self._tokens.canonical([(*self._anchor, *ids, t) for t in tried])
        law = law.clone()
        law[[t for t, ok in zip(tried, fine, strict=True) if not ok]] = 0.0
        return law

    def _valid(self, ids: tuple[int, ...]) -> bool:
        return self._tokens.canonical([(*self._anchor, *ids)])[0]


@contextmanager
def open_bytes(
    model: Any,
    tokens: ByteTokens,
    prompt: Sequence[int],
    eos: Collection[int],
    *,
    mode: Mode = "canonical",
    prune: float = 1e-6,
    tail: float = 1e-3,
) -> Iterator[ByteState]:
    """The state of `model` behind the bytes of `prompt`, whose last word may be part of a longer token.

    Tokens before the last word (or the first token, where the prompt is one word) count as they are.

    Raises:
        ValueError: for a prompt without tokens.
    """
    if not prompt:
        raise ValueError(
            "byte-level-probabilities: the text has no tokens, and this tokenizer puts none in front of it; begin with "
            "its start token as text, or with a line of text"
        )
    cut = tokens.split(prompt) or 1
    safe = tokens.split(prompt) > 0 or tokens.pieces[prompt[0]] is None
    with open_session(model, [list(prompt[:cut])]) as session:
        state = ByteState(session, tokens, () if safe else prompt[:cut], eos, mode, prune, tail)
        for byte in tokens.vocabulary.decode(prompt[cut:]):
            state.advance(byte)
        yield state


def next_byte_probabilities(model: Any, tokenizer: Any, text: str, *, mode: Mode = "canonical") -> Tensor:
    """[257]: the law of the byte after `text`, and of its end; exact for "canonical" and "all" in their senses.

    Raises:
        ValueError: for an empty text without a start token.
    """
    tokens = ByteTokens(tokenizer, getattr(getattr(model, "config", None), "vocab_size", None))
    exact = {"prune": 0.0, "tail": 0.0} if mode == "all" else {}
    with open_bytes(model, tokens, list(tokenizer.encode(text)), _ends(model, tokenizer), mode=mode, **exact) as state:
        return state.law()


@decoder("byte-level-probabilities", kind="loop")
class ByteLevel(Loop):
    """Text byte by byte from the exact byte law, whatever the prompt's last token; several models on average.

    `others`: further models with their tokenizers, [(model, tokenizer), ...], which get the prompt's text.
    max_new_tokens counts bytes here. temperature, top_p: of bytes; those of `generate` speak of tokens and must be off.
    mode "canonical": text as the tokenizer writes it, fast; "all": every tokenization. prune: tokenizations below this
    share of the best are dropped. tail: mass of tokens that are not checked for being canonical.
    """

    unmasked = "draws bytes"

    def __init__(
        self,
        tokenizer: Any,
        others: Any = None,
        *,
        temperature: float = 1.0,
        top_p: float = 1.0,
        mode: Literal["canonical", "all"] = "canonical",
        prune: float = 1e-6,
        tail: float = 1e-3,
    ) -> None:
        if temperature < 0 or not 0 < top_p <= 1:
            raise ValueError(f"byte-level-probabilities: temperature {temperature} or top_p {top_p} out of range")
        self.tokenizer, self.others = tokenizer, list(others or [])
        self.temperature, self.top_p = temperature, top_p
        self.mode, self.prune, self.tail = mode, prune, tail
        self.texts: list[bytes] = []
        """What was written in each row of the last call, half a character at the end included."""

    def rows(self, run: Run) -> list[list[int]]:
        """See `Loop`.

        Raises:
            ValueError: with processors of token laws, or bytes that a model cannot write.
        """
        if run.processors:
            names = ", ".join(type(p).__name__ for p in run.processors)
            raise ValueError(
                f"byte-level-probabilities shapes bytes, not tokens, and cannot apply {names}: give temperature and "
                "top_p to the loop, and temperature=1.0, top_k=0, top_p=1.0 to generate"
            )
        size = getattr(getattr(run.model, "config", None), "vocab_size", None)
        tokens = ByteTokens(self.tokenizer, size)
        others = [(m, ByteTokens(t, getattr(m.config, "vocab_size", None)), _ends(m, t)) for m, t in self.others]
        self.texts = []
        return [self._row(run, row, tokens, others) for row in range(len(run))]

    def _row(self, run: Run, row: int, tokens: ByteTokens, others: Sequence[tuple[Any, ByteTokens, Any]]) -> list[int]:
        prompt = run.prompts[row]
        options: Any = {"mode": self.mode, "prune": self.prune, "tail": self.tail}
        with ExitStack() as stack:
            states = [stack.enter_context(open_bytes(run.model, tokens, prompt, run.eos, **options))]
            text, half = _whole_characters(tokens, prompt)
            for model, theirs, eos in others:
                ids = list(theirs.vocabulary.tokenizer.encode(text))
                # Without an end token of the run's nothing ends, whatever the others would say.
                ends = eos if run.eos else ()
                states.append(stack.enter_context(open_bytes(model, theirs, ids, ends, **options)))
                for byte in half:
                    states[-1].advance(byte)
            written = bytearray()
            ended = stopped = False
            while len(written) < run.limit and not stopped:
                mixed = mean_law(torch.stack([state.law() for state in states]))
                law = next_byte_law(mixed, temperature=self.temperature if run.sample else 0.0, top_p=self.top_p)
                byte = run.draw.categorical(law) if run.sample else int(law.argmax())
                ended = byte == END
                if ended:
                    break
                for state in states:
                    state.advance(byte)
                written.append(byte)
                if run.criteria:
                    ids = tokens.vocabulary.encode_bytes(bytes(written))
                    stopped = run.until_stop(row, ids[:-1], ids[-1:])[1]
        self.texts.append(bytes(written))
        ids = tokens.vocabulary.encode_bytes(bytes(written))
        if ended:
            ids.append(min(run.eos))
        run.stream(row, ids)
        return ids


def _whole_characters(tokens: ByteTokens, prompt: Sequence[int]) -> tuple[str, bytes]:
    """A prompt's text without control tokens, and the first bytes of a character that its end cuts."""
    data = tokens.vocabulary.decode(prompt)
    if tokens.vocabulary.leading_blank:
        data = data.removeprefix(b" ")
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    return decoder.decode(data), decoder.getstate()[0]


def _ends(model: Any, tokenizer: Any) -> list[int]:
    """End tokens of a model and its tokenizer."""
    ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    found = {ends} if isinstance(ends, int) else set(ends or [])
    return sorted(found | ({tokenizer.eos_token_id} - {None}))
