"""RMOD as a loop, and the training of its values.

    heads = rmod.fit(*rmod.examples(model, prompts, responses, rewards))
    model.generate(**inputs, do_sample=True, custom_generate=decode.loop("rmod", values=heads))

Values are `ValueHeads`, or a list of rewards (see `tokenloom.decode.rewards`) that can judge unfinished responses.

Letters: N examples, G objectives, D hidden size, K blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tokenloom.decode.registry import decoder
from tokenloom.decode.rewards import reward_of
from tokenloom.decode.run import Run
from tokenloom.decode.segment_search import Hypothesis, SearchLoop, draws, segment_search
from tokenloom.decode.session import open_session
from tokenloom.methods.decoding.rmod import best_block, block_law, robust_weights, value_loss


class ValueHeads(nn.Module):
    """The values [..., G] of prefixes from the model's last hidden state at their last token [..., D]; float32."""

    def __init__(self, hidden_size: int, objectives: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden_size, objectives)

    def forward(self, hidden: Tensor) -> Tensor:
        """See the class."""
        values: Tensor = self.linear(hidden.to(self.linear.weight.dtype))
        return values

    def save(self, path: str | Path) -> None:
        """Write the weights as safetensors."""
        from safetensors.torch import save_file

        save_file(self.state_dict(), str(path))

    @classmethod
    def load(cls, path: str | Path) -> ValueHeads:
        """Heads as `save` wrote them."""
        from safetensors.torch import load_file

        state = load_file(str(path))
        objectives, hidden_size = state["linear.weight"].shape
        heads = cls(hidden_size, objectives)
        heads.load_state_dict(state)
        return heads


@decoder("rmod", kind="loop")
class Rmod(SearchLoop):
    """Of `candidates` blocks of `block` tokens the one that is best under the worst weighting of the objectives."""

    def __init__(
        self,
        values: Any,
        tokenizer: Any = None,
        *,
        candidates: int = 8,
        block: int = 16,
        lam: float = 1.0,
        iterations: int = 10,
        eta: float = 1.0,
        choose: Literal["best", "sample"] = "best",
    ) -> None:
        """Raises ValueError for impossible numbers or unusable values."""
        if candidates < 1 or block < 1:
            raise ValueError(f"rmod: candidates and block must be at least 1, got {candidates} and {block}")
        if choose not in ("best", "sample"):
            raise ValueError(f"rmod: choose is 'best' or 'sample', got {choose!r}")
        self._solver: dict[str, Any] = {"lam": lam, "iterations": iterations, "eta": eta}
        robust_weights(torch.zeros(1, 1), **self._solver)
        self.candidates, self.block, self.choose = candidates, block, choose
        self._heads = values if isinstance(values, nn.Module) else None
        if self._heads is None:
            listed = list(values) if isinstance(values, list | tuple) else [values]
            self._rewards = [reward_of("rmod", reward, tokenizer) for reward in listed]
            if not listed:
                raise ValueError("rmod: at least one objective is needed; give value heads or a list of rewards")

    def search(self, run: Run) -> list[list[Hypothesis]]:
        """See `SearchLoop`."""
        found: dict[tuple[int, tuple[int, ...]], Tensor] = {}

        def score(candidates: list[Hypothesis]) -> list[float]:
            found.clear()
            found.update(zip([h.key for h in candidates], self._values(run, candidates), strict=True))
            return [0.0] * len(candidates)

        def select(candidates: list[Hypothesis]) -> list[Hypothesis]:
            values = torch.stack([found[h.key] for h in candidates])
            weights = robust_weights(values, **self._solver)
            if self.choose == "best":
                return [candidates[best_block(values, weights)]]
            return [candidates[run.draw.categorical(block_law(values, weights, lam=self._solver["lam"]))]]

        return segment_search(
            run,
            propose=lambda live: draws(run, live, [self.candidates] * len(live)),
            boundary=lambda h: len(h.tokens) - h.begin >= self.block,
            score=score,
            select=select,
            width=1,
            ahead=self._heads is not None,
            hidden=self._heads is not None,
        )

    def _values(self, run: Run, candidates: list[Hypothesis]) -> Tensor:
        """[N, G], on the CPU."""
        if self._heads is None:
            return torch.tensor([reward(run, candidates) for reward in self._rewards], dtype=torch.float64).T
        with torch.no_grad():
            states = torch.stack([h.hidden for h in candidates if h.hidden is not None])
            values: Tensor = self._heads(states.to(next(self._heads.parameters()).device)).cpu()
        return values


def examples(
    model: Any,
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    rewards: Sequence[Sequence[float]] | Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states [B, T, D] at the responses' tokens, rewards [B, G] and mask [B, T] to train heads on.

    Responses should be the model's own. All float32, on the CPU.

    Raises:
        ValueError: for an empty response, or lists of different lengths.
    """
    table = torch.as_tensor(rewards, dtype=torch.float32).view(len(responses), -1)
    if len(prompts) != len(responses) or not all(len(r) for r in responses):
        raise ValueError("rmod: each prompt needs a response of one token at least")
    longest = max(len(r) for r in responses)
    states, mask = [], torch.zeros(len(responses), longest, dtype=torch.bool)
    for i, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        with open_session(model, [prompt], output_hidden_states=True) as session:
            session.start()
            session.extend([response])
            last: Tensor = session.output.hidden_states[-1][0].float().cpu()  # type: ignore[attr-defined]  # of model sessions
        states.append(nn.functional.pad(last, (0, 0, 0, longest - len(response))))
        mask[i, : len(response)] = True
    return torch.stack(states), table, mask


def fit(
    hidden: Tensor,
    rewards: Tensor,
    mask: Tensor,
    *,
    target: Literal["final", "td"] = "final",
    steps: int = 500,
    lr: float = 1e-2,
    weight_decay: float = 1e-2,
    seed: int = 0,
    progress: Callable[[int, float], None] | None = None,
) -> ValueHeads:
    """Heads fitted to `examples` by AdamW on all of them at once; `progress(step, loss)` after each step."""
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(seed)
        heads = ValueHeads(hidden.shape[-1], rewards.shape[-1])
        optimizer = torch.optim.AdamW(heads.parameters(), lr=lr, weight_decay=weight_decay)
        for step in range(steps):
            loss = value_loss(heads(hidden), rewards, mask, target=target)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]  # PyTorch's has no annotations
            optimizer.step()
            if progress is not None:
                progress(step + 1, float(loss.detach()))
    return heads.requires_grad_(False)
