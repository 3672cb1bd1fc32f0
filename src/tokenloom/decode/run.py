"""`Run`: one call of `model.generate(custom_generate=...)`, seen from inside a loop.

It strips the padding from the prompts, applies the processors to any prefix, knows when a row must stop, and gives back
what `generate` would. A loop is a callable object:

    class MyLoop(Loop):
        def rows(self, run: Run) -> list[list[int]]: ...   # the new ids of each row

Letters: B rows, N prefixes, V vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.generation.utils import GenerateDecoderOnlyOutput

from tokenloom.decode.session import Session, open_session
from tokenloom.decode.shapers import wide
from tokenloom.draw import Draw, RandomDraw


@dataclass
class Run:
    """What `generate` handed over."""

    model: Any
    input_ids: Tensor
    """[B, P] as `generate` got them, padded on the left."""
    prompts: list[list[int]]
    """The same without padding."""
    limit: int
    """Most new tokens of a row."""
    eos: frozenset[int]
    pad: int
    sample: bool
    """False: the law is all on the most probable token, the lowest id among equals."""
    processors: Sequence[Any] = ()
    criteria: Sequence[Any] = ()
    draw: Draw = field(default_factory=RandomDraw)
    streamer: Any = None
    counts: dict[str, float] = field(default_factory=dict)
    """What the loop counted, such as forwards; kept as `last_run` of the loop."""

    def __len__(self) -> int:
        return len(self.prompts)

    @contextmanager
    def session(self, rows: Sequence[int] | None = None, **model_options: Any) -> Iterator[Session]:
        """A session over the prompts of all rows, or of those at `rows` (repeats allowed)."""
        chosen = range(len(self)) if rows is None else rows
        with open_session(self.model, [self.prompts[r] for r in chosen], **model_options) as session:
            yield session

    def shaped(self, rows: Sequence[int], generated: Sequence[Sequence[int]], scores: Tensor) -> Tensor:
        """`scores` [N, V] of prefixes, after all processors: prefix i is the prompt of `rows[i]` and `generated[i]`.

        At least float32. Processors see the ids as in `generate`, padding of the prompt included.
        """
        scores = wide(scores)
        if not self.processors:
            return scores
        if all(map(_reads_no_ids, self.processors)):
            ids = self.input_ids[list(rows)]
            for processor in self.processors:
                scores = processor(ids, scores)
            return wide(scores)
        by_length: dict[int, list[int]] = {}
        for i, new in enumerate(generated):
            by_length.setdefault(len(new), []).append(i)
        shaped = torch.empty_like(scores)
        for length, at in by_length.items():
            news = torch.tensor([list(generated[i]) for i in at], dtype=torch.int64, device=self.input_ids.device)
            ids = torch.cat((self.input_ids[[rows[i] for i in at]], news.view(len(at), length)), 1)
            part = scores[at].clone()
            for processor in self.processors:
                part = processor(ids, part)
            shaped[at] = part.to(shaped.dtype)
        return shaped

    def laws(self, rows: Sequence[int], generated: Sequence[Sequence[int]], scores: Tensor) -> Tensor:
        """The laws [N, V] that plain `generate` would draw from: processors, then softmax, or all on the maximum."""
        shaped = self.shaped(rows, generated, scores)
        if self.sample:
            return shaped.softmax(-1)
        return torch.zeros_like(shaped).scatter_(1, shaped.argmax(-1, keepdim=True), 1.0)

    def choose(self, rows: Sequence[int], generated: Sequence[Sequence[int]], scores: Tensor) -> list[int]:
        """One token for each prefix, drawn by `draw`, or the most probable."""
        if not self.sample:
            return [int(t) for t in self.shaped(rows, generated, scores).argmax(-1)]
        return [self.draw.categorical(law) for law in self.laws(rows, generated, scores)]

    def until_stop(self, row: int, generated: Sequence[int], new: Sequence[int]) -> tuple[list[int], bool]:
        """`new` tokens cut behind the first that ends the row after `generated`, and whether one did."""
        kept: list[int] = []
        for token in new:
            kept.append(int(token))
            if token in self.eos or len(generated) + len(kept) >= self.limit:
                return kept, True
            if self.criteria and self._criteria_met(row, [*generated, *kept]):
                return kept, True
        return kept, False

    def append(self, rows: Sequence[int], generated: Sequence[list[int]], chosen: Sequence[int]) -> list[int]:
        """Add to `generated[row]` the token chosen for each of `rows`, and stream it; the places that go on."""
        running = []
        for place, (row, token) in enumerate(zip(rows, chosen, strict=True)):
            _, stopped = self.until_stop(row, generated[row], [token])
            generated[row].append(token)
            self.stream(row, [token])
            if not stopped:
                running.append(place)
        return running

    def _criteria_met(self, row: int, generated: Sequence[int]) -> bool:
        ids = torch.cat((self.input_ids[row], torch.tensor(list(generated), device=self.input_ids.device)))[None]
        nothing: Any = None
        return any(bool(torch.as_tensor(met(ids, nothing)).all()) for met in self.criteria)

    def stream(self, row: int, new: Sequence[int]) -> None:
        """Hand new tokens of the only row to the streamer."""
        if self.streamer is not None and row == 0 and new:
            self.streamer.put(torch.tensor(list(new)))

    def result(self, generated: Sequence[Sequence[int]]) -> Tensor:
        """[B, P + longest]: the ids as given and the new ones, padded on the right."""
        width = max((len(g) for g in generated), default=0)
        new = [[*g, *([self.pad] * (width - len(g)))] for g in generated]
        tail = torch.tensor(new, dtype=torch.int64, device=self.input_ids.device).view(len(generated), width)
        return torch.cat((self.input_ids, tail), 1)


def _reads_no_ids(processor: Any) -> bool:
    """Whether what a processor makes of scores depends on them alone, whatever the text is."""
    from transformers.generation import logits_process as known

    names = ("Temperature", "TopK", "TopP", "MinP", "Typical", "Epsilon", "Eta")
    return type(processor) in {getattr(known, f"{name}LogitsWarper") for name in names}


class Loop(ABC):
    """Base of generate loops; an instance is what `custom_generate` takes. Subclasses write `rows`.

    `draw` is the source of random choices (default: PyTorch's global state, as `generate`'s own). `streamer` is set
    here, since `generate` hands its own to no loop but its own. After a call, `last_run` is the run with what was
    counted.
    """

    batches: bool = True
    """Whether it takes several rows at once."""
    unmasked: str = ""
    """What it does that no mask of the tokens behind a prompt can follow, where it does."""
    draw: Draw | None = None
    streamer: Any = None
    last_run: Run | None = None

    @abstractmethod
    def rows(self, run: Run) -> list[list[int]]:
        """The new ids of each row."""

    def __call__(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: Any = (),
        stopping_criteria: Any = (),
        generation_config: Any = None,
        **model_kwargs: Any,
    ) -> Any:
        """Called by `generate`; gives ids [B, T], or `generate`'s output object if the configuration asks for one.

        Raises:
            ValueError: for a prompt without tokens, inputs other than ids, or streaming of several rows.
        """
        if model_kwargs.get("inputs_embeds") is not None or input_ids.shape[1] == 0:
            raise ValueError(f"{type(self).__name__} decodes from input_ids; prompts as embeddings are not taken")
        if not self.batches and len(input_ids) > 1:
            raise ValueError(
                f"{type(self).__name__} decodes one row at a time and got {len(input_ids)}; call generate for each "
                "prompt (tokenloom.decode.respond does)"
            )
        if self.streamer is not None and len(input_ids) > 1:
            raise ValueError("a streamer shows one row; give one prompt and num_return_sequences=1")
        # Not a parameter of its own: `generate` would hand over twice what a signature names.
        mask = model_kwargs.get("attention_mask")
        run = run_of(model, input_ids, logits_processor, stopping_criteria, generation_config, mask)
        run.streamer = self.streamer
        if self.draw is not None:
            run.draw = self.draw
        self.last_run = run
        ids = run.result(self.rows(run))
        if self.streamer is not None:
            self.streamer.end()
        if getattr(generation_config, "return_dict_in_generate", False):
            return GenerateDecoderOnlyOutput(sequences=ids)  # type: ignore[arg-type]  # LongTensor is nominal
        return ids


def run_of(
    model: Any, input_ids: Tensor, processors: Any, criteria: Any, config: Any, attention_mask: Tensor | None
) -> Run:
    """A `Run` from the arguments of `custom_generate`."""
    from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria

    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids)
    prompts = [ids[real.bool()].tolist() for ids, real in zip(input_ids, attention_mask, strict=True)]
    ends = getattr(config, "eos_token_id", None)
    eos = frozenset([] if ends is None else [ends] if isinstance(ends, int) else ends)
    pad = getattr(config, "pad_token_id", None)
    limit = config.max_length - input_ids.shape[1]
    if limit < 1:
        raise ValueError(f"max_length is {config.max_length} and the prompts have {input_ids.shape[1]} tokens already")
    # Ends and lengths are checked here, token by token, without a call.
    others = [c for c in criteria if not isinstance(c, EosTokenCriteria | MaxLengthCriteria)]
    return Run(
        model=model,
        input_ids=input_ids,
        prompts=prompts,
        limit=limit,
        eos=eos,
        pad=next(iter(sorted(eos)), 0) if pad is None else int(pad),
        sample=bool(config.do_sample),
        processors=list(processors),
        criteria=others,
    )
