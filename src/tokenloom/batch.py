"""`Rollouts`: what happened when a policy answered prompts. Immutable, serializable data.

Letters: B rows, T response positions (right-padded), P_i prompt length of row i.
Entry t of every [B, T] tensor speaks of token t of the response; validity comes from
`lengths` and `mask`, never from comparing with a padding id.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Self, cast

import torch
from torch import Tensor

from tokenloom.masked import row_index, valid_positions


@dataclass(frozen=True, slots=True)
class Sampling:
    """Under what processing the tokens were drawn, and what `sampler_logprobs` refer to.

    `max_tokens` is the longest response that could have been sampled, 0 when nobody said.
    `temperature` divides the logits (0 means greedy, recorded at temperature 1); `top_k` 0
    and `top_p` 1 mean no truncation. `processed` says which law `sampler_logprobs` record:
    True, the law actually sampled from (after truncation); False, the temperature-scaled
    full softmax, which is what training log-probs are compared with.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    max_tokens: int = 0
    stop: tuple[str, ...] = ()
    seed: int | None = None
    processed: bool = False


@dataclass(frozen=True, eq=False)
class Rollouts:
    """Sampled responses with their rewards.

    Shapes and meanings are those of the architecture's table: `prompt_tokens` is a tuple of
    int64 tensors [P_i]; `tokens` [B, T] int64; `lengths` [B] int64 valid response tokens (tool
    output included); `mask` [B, T] bool, True where the policy sampled the token; `group_ids`
    [B] int64, the prompt a row answers, in any order and any group size; `rewards` [B] float,
    NaN for a response that could not be scored; `extras`, [B] or [B, T] by name, is what parts asked to be
    collected beside the responses (`vocabulary.EXTRAS`).

    Raises:
        ValueError: when shapes disagree or `mask` reaches beyond `lengths`.
    """

    prompt_tokens: tuple[Tensor, ...]
    tokens: Tensor
    lengths: Tensor
    mask: Tensor
    group_ids: Tensor
    rewards: Tensor | None = None
    reward_components: dict[str, Tensor] = field(default_factory=dict)
    truncated: Tensor | None = None
    answers: tuple[Any, ...] | None = None
    prompts: tuple[dict[str, Any], ...] | None = None
    sampler_logprobs: Tensor | None = None
    sampling: Sampling = Sampling()
    policy_version: Tensor | None = None
    extras: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.tokens.ndim != 2:
            raise ValueError(f"tokens must be [B, T], got shape {tuple(self.tokens.shape)}")
        b, t = self.tokens.shape
        expected: dict[str, tuple[int, ...]] = {"lengths": (b,), "mask": (b, t), "group_ids": (b,)}
        expected |= {name: (b,) for name in ("rewards", "truncated", "policy_version")}
        expected["sampler_logprobs"] = (b, t)
        for name, shape in expected.items():
            value = getattr(self, name)
            if value is not None and tuple(value.shape) != shape:
                raise ValueError(f"{name} has shape {tuple(value.shape)}, expected {shape}")
        for name, value in self.reward_components.items():
            if tuple(value.shape) != (b,):
                raise ValueError(f"reward component {name!r} has shape {tuple(value.shape)}, expected {(b,)}")
        for name, value in self.extras.items():
            if tuple(value.shape) not in ((b,), (b, t)):
                raise ValueError(f"extra {name!r} has shape {tuple(value.shape)}, expected {(b,)} or {(b, t)}")
        for name in ("prompt_tokens", "answers", "prompts"):
            value = getattr(self, name)
            if value is not None and len(value) != b:
                raise ValueError(f"{name} has {len(value)} entries for {b} rows")
        for name in ("mask", "truncated"):
            value = getattr(self, name)
            if value is not None and value.dtype != torch.bool:
                raise ValueError(f"{name} must be bool, got {value.dtype}; use {name}.bool()")
        for name in ("tokens", "lengths", "group_ids"):
            value = getattr(self, name)
            if value.dtype == torch.bool or value.is_floating_point():
                raise ValueError(f"{name} must be integers, got {value.dtype}; use {name}.long()")
        if bool((self.lengths > t).any()) or bool((self.lengths < 0).any()):
            raise ValueError(f"lengths must lie in [0, {t}], the padded width of tokens")
        if bool((self.mask & ~valid_positions(self.lengths, t)).any()):
            raise ValueError("mask is True beyond a row's length: a padding token cannot have been sampled")

    def __len__(self) -> int:
        return int(self.tokens.shape[0])

    @classmethod
    def build(
        cls,
        prompt_tokens: Sequence[Sequence[int] | Tensor],
        response_tokens: Sequence[Sequence[int] | Tensor],
        group_ids: Sequence[int] | Tensor,
        *,
        pad_id: int = 0,
        response_masks: Sequence[Sequence[bool]] | None = None,
        sampler_logprobs: Sequence[Sequence[float] | Tensor] | None = None,
        **rest: Any,
    ) -> Self:
        """Pad ragged responses on the right into one batch. `pad_id` is cosmetic: nothing compares with it.

        Raises:
            ValueError: when masks or log-probs do not match the responses in length, and as the class does.
        """
        rows = [torch.as_tensor(r, dtype=torch.int64).reshape(-1) for r in response_tokens]
        for name, beside in (("response_masks", response_masks), ("sampler_logprobs", sampler_logprobs)):
            if beside is not None and [len(x) for x in beside] != [len(r) for r in rows]:
                raise ValueError(
                    f"{name} must have one entry per response token: lengths {[len(x) for x in beside]} for "
                    f"responses of {[len(r) for r in rows]}"
                )
        lengths = torch.tensor([len(r) for r in rows], dtype=torch.int64)
        t = int(lengths.max()) if len(rows) else 0
        tokens = torch.full((len(rows), t), pad_id, dtype=torch.int64)
        logprobs = torch.zeros(len(rows), t) if sampler_logprobs is not None else None
        mask = valid_positions(lengths, t)
        for i, row in enumerate(rows):
            tokens[i, : len(row)] = row
            if response_masks is not None:
                mask[i, : len(row)] = torch.as_tensor(response_masks[i], dtype=torch.bool)
            if logprobs is not None and sampler_logprobs is not None:
                logprobs[i, : len(row)] = torch.as_tensor(sampler_logprobs[i], dtype=torch.float32)
        return cls(
            prompt_tokens=tuple(torch.as_tensor(p, dtype=torch.int64).reshape(-1) for p in prompt_tokens),
            tokens=tokens,
            lengths=lengths,
            mask=mask,
            group_ids=torch.as_tensor(group_ids, dtype=torch.int64),
            sampler_logprobs=logprobs,
            **rest,
        )

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields changed, validated again."""
        return replace(self, **changes)

    def rows(self, index: Tensor | Sequence[int]) -> Self:
        """The rows at `index` [n] (int64), in that order, with every field cut alike. T is kept.

        Raises:
            ValueError: for a bool mask, which would read as rows 0 and 1.
        """
        at = row_index(index)
        chosen = at.tolist()
        changes: dict[str, Any] = {n: {k: v[at] for k, v in getattr(self, n).items()} for n in _TABLES}
        for name in _TENSORS:
            value = getattr(self, name)
            changes[name] = None if value is None else value[at]
        for name in _LISTS:
            value = getattr(self, name)
            changes[name] = None if value is None else tuple(value[i] for i in chosen)
        return replace(self, **changes)

    @classmethod
    def concat(cls, parts: Sequence[Self]) -> Self:
        """Stack batches row-wise, padding T to the widest. `group_ids` are kept: equal ids are one group.

        Raises:
            ValueError: on an empty list, when a field is present in some batches only, or when the batches
                were sampled differently (their seeds may differ; the first one's is kept).
        """
        if not parts:
            raise ValueError("concat needs at least one batch")
        laws = {replace(p.sampling, seed=None) for p in parts}
        if len(laws) > 1:
            raise ValueError(f"the batches were sampled differently: {sorted(map(str, laws))}")
        t = max(int(p.tokens.shape[1]) for p in parts)
        changes: dict[str, Any] = {}
        for name in (*_TENSORS, *_LISTS):
            values = [getattr(p, name) for p in parts]
            if any(v is None for v in values):
                if not all(v is None for v in values):
                    raise ValueError(f"{name} is present in some of the batches only; fill or drop it first")
                changes[name] = None
            elif name in _LISTS:
                changes[name] = tuple(x for v in values for x in v)
            else:
                changes[name] = torch.cat([_widen(v, t) if v.ndim == 2 else v for v in values])
        for table in _TABLES:
            entries = [getattr(p, table) for p in parts]
            names = {tuple(sorted(e)) for e in entries}
            if len(names) > 1:
                raise ValueError(f"the batches name different {table.replace('_', ' ')}: {sorted(names)}")
            changes[table] = {
                k: torch.cat([_widen(e[k], t) if e[k].ndim == 2 else e[k] for e in entries]) for k in entries[0]
            }
        return replace(parts[0], **changes)

    def response(self, row: int) -> Tensor:
        """Token ids of one response without padding, [lengths[row]] int64."""
        return self.tokens[row, : int(self.lengths[row])]

    def save(self, folder: str | Path) -> None:
        """Write `rollouts.safetensors` and `rollouts.json` into `folder` (made if missing)."""
        from safetensors.torch import save_file

        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        # Cloned, because safetensors refuses tensors that share memory, as rewards and a component often do.
        tensors = {n: _owned(getattr(self, n)) for n in _TENSORS if getattr(self, n) is not None}
        tensors |= {f"{n}.{k}": _owned(v) for n in _TABLES for k, v in getattr(self, n).items()}
        tensors["prompt_tokens"] = (
            torch.cat(self.prompt_tokens) if self.prompt_tokens else torch.zeros(0, dtype=torch.int64)
        )
        tensors["prompt_lengths"] = torch.tensor([len(p) for p in self.prompt_tokens], dtype=torch.int64)
        save_file(tensors, target / "rollouts.safetensors")
        meta = {"answers": self.answers, "prompts": self.prompts, "sampling": asdict(self.sampling)}
        (target / "rollouts.json").write_text(json.dumps(meta, default=str), encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Read what `save` wrote. Answers and prompt metadata come back as JSON values."""
        from safetensors.torch import load_file

        source = Path(folder)
        tensors = load_file(source / "rollouts.safetensors")
        meta = json.loads((source / "rollouts.json").read_text(encoding="utf-8"))
        prompt_lengths = tensors.pop("prompt_lengths").tolist()
        joined = tensors.pop("prompt_tokens")
        prompt_tokens = tuple(torch.split(joined, prompt_lengths)) if prompt_lengths else ()
        tables: dict[str, dict[str, Tensor]] = {n: {} for n in _TABLES}
        for key in [k for k in tensors if k.split(".")[0] in _TABLES]:
            table, _, name = key.partition(".")
            tables[table][name] = tensors.pop(key)
        sampling = meta["sampling"] | {"stop": tuple(meta["sampling"]["stop"])}
        return cls(
            prompt_tokens=prompt_tokens,
            answers=None if meta["answers"] is None else tuple(meta["answers"]),
            prompts=None if meta["prompts"] is None else tuple(meta["prompts"]),
            sampling=Sampling(**sampling),
            reward_components=tables["reward_components"],
            extras=tables["extras"],
            **cast(dict[str, Any], tensors),
        )


_LISTS = ("prompt_tokens", "answers", "prompts")
_TABLES = ("reward_components", "extras")
_TENSORS = tuple(f.name for f in fields(Rollouts) if f.name not in (*_LISTS, *_TABLES, "sampling"))


def _owned(x: Tensor) -> Tensor:
    return x.detach().clone(memory_format=torch.contiguous_format)


def _widen(x: Tensor, width: int) -> Tensor:
    return torch.nn.functional.pad(x, (0, width - x.shape[1]))
