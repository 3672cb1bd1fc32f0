"""TRL's own trainers, made small: its loss on given tensors, and a real trainer on a tiny model.

Nothing of TRL is typed again here. `grpo_loss` and `rloo_loss` call the `_compute_loss` of a trainer that skipped its
heavy `__init__`; `grpo_trainer` and `rloo_trainer` are whole trainers whose completions can be prescribed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from accelerate import Accelerator
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor
from transformers import PreTrainedTokenizerFast
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.rloo_config import RLOOConfig
from trl.trainer.rloo_trainer import RLOOTrainer

from tiny_models import tiny_llama
from tokenloom.algorithm import Algorithm
from tokenloom.batch import Rollouts
from tokenloom.signals import Signals

VOCABULARY = 24
QUIET = {"use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True, "save_strategy": "no"}


def grpo_config(folder: Any, **settings: Any) -> GRPOConfig:
    """TRL's configuration with its defaults, on the CPU and silent."""
    return GRPOConfig(output_dir=str(folder), **QUIET, **settings)


def _bare(kind: type, args: Any, logprobs: Tensor, entropies: Tensor) -> Any:
    """A trainer of `kind` whose model "says" the given log-probs and entropies."""
    trainer = kind.__new__(kind)
    trainer.__dict__.update(
        args=args,
        accelerator=Accelerator(cpu=True),
        model=SimpleNamespace(training=True),
        aux_loss_enabled=False,
        current_gradient_accumulation_steps=1,
        epsilon_low=args.epsilon,
        epsilon_high=args.epsilon if args.epsilon_high is None else args.epsilon_high,
        beta=args.beta,
        max_completion_length=args.max_completion_length,
        _metrics={"train": defaultdict(list)},
        _get_per_token_logps_and_entropies=lambda *_, **__: (logprobs, entropies, None),
        # What TRL's profiling decorator asks for.
        state=SimpleNamespace(global_step=0),
    )
    return trainer


def _inputs(rollouts: Rollouts) -> dict[str, Tensor]:
    rows, width = rollouts.mask.shape
    inside = torch.arange(width)[None] < rollouts.lengths[:, None]
    return {
        "prompt_ids": torch.zeros(rows, 1, dtype=torch.int64),
        "prompt_mask": torch.ones(rows, 1, dtype=torch.int64),
        "completion_ids": rollouts.tokens,
        "completion_mask": inside.long(),
        "tool_mask": rollouts.mask.long(),
        "num_items_in_batch": rollouts.mask.sum(),
    }


def grpo_loss(
    args: GRPOConfig, rollouts: Rollouts, signals: Signals, advantages: Tensor, *, old: bool = True, **more: Tensor
) -> tuple[Tensor, Tensor]:
    """TRL's GRPO loss and its gradient with respect to the log-probs, for given advantages [B, T]."""
    assert signals.logprobs is not None
    assert signals.entropies is not None
    leaf = signals.logprobs.clone().requires_grad_()
    trainer = _bare(GRPOTrainer, args, leaf, signals.entropies)
    trainer.__dict__.update(
        loss_type=args.loss_type,
        importance_sampling_level=args.importance_sampling_level,
        top_entropy_quantile=args.top_entropy_quantile,
        off_policy_mask_threshold=args.off_policy_mask_threshold,
        use_vllm="importance_sampling_ratio" in more,
        vllm_importance_sampling_correction=True,
        _entropy_bonus_enabled=False,
    )
    inputs: dict[str, Any] = _inputs(rollouts) | {"advantages": advantages, "ref_per_token_logps": signals.ref_logprobs}
    inputs |= {"old_per_token_logps": signals.old_logprobs if old else None} | more
    loss = trainer._compute_loss(None, inputs)
    (gradient,) = torch.autograd.grad(loss, leaf)
    return loss.detach(), gradient


def rloo_loss(args: RLOOConfig, rollouts: Rollouts, signals: Signals, advantages: Tensor) -> tuple[Tensor, Tensor]:
    """TRL's RLOO loss and its gradient with respect to the log-probs, for given advantages [B]."""
    assert signals.logprobs is not None
    assert signals.old_logprobs is not None
    assert signals.entropies is not None
    leaf = signals.logprobs.clone().requires_grad_()
    trainer = _bare(RLOOTrainer, args, leaf, signals.entropies)
    inputs = _inputs(rollouts)
    old = (signals.old_logprobs * inputs["completion_mask"]).sum(1)
    loss = trainer._compute_loss(None, inputs | {"advantages": advantages, "old_logps": old})
    (gradient,) = torch.autograd.grad(loss, leaf)
    return loss.detach(), gradient


def own_loss(algorithm: Algorithm, rollouts: Rollouts, signals: Signals) -> tuple[Tensor, Tensor]:
    """Tokenloom's loss and its gradient with respect to the log-probs, all rows in one update."""
    assert signals.logprobs is not None
    plan = algorithm.plan(rollouts, signals, one_update=True)
    leaf = signals.logprobs.clone().requires_grad_()
    alive = signals.replace(logprobs=leaf)
    total = torch.zeros(())
    for update in plan.updates:
        total = total + algorithm.loss(alive.rows(update.rows), update)[0]
    (gradient,) = torch.autograd.grad(total, leaf)
    return total.detach(), gradient


def batch(
    seed: int = 0, *, groups: int = 3, size: int = 4, width: int = 7, empty: bool = True
) -> tuple[Rollouts, Signals]:
    """Float32: contiguous groups of equal size as TRL has them, tool output in the middle, ratios beyond every clip."""
    g = torch.Generator().manual_seed(seed)
    rows = groups * size
    lengths = torch.randint(1, width + 1, (rows,), generator=g)
    lengths[0] = width
    mask = torch.arange(width)[None] < lengths[:, None]
    mask[0, 2:4] = False
    if empty:
        mask[5] = False
    rewards = torch.rand(rows, generator=g)
    rewards[1], rewards[2] = -1.0, 2.0
    logprobs = -2 * torch.rand(rows, width, generator=g) - 0.1
    log_ratio = 0.4 * torch.randn(rows, width, generator=g)
    # Where the clips differ: the worst row beyond delta, the best between 1.2 and 1.28.
    log_ratio[1, 0], log_ratio[2, 0] = 1.6, 0.22
    rollouts = Rollouts(
        prompt_tokens=tuple(torch.zeros(1, dtype=torch.int64) for _ in range(rows)),
        tokens=torch.zeros(rows, width, dtype=torch.int64),
        lengths=lengths,
        mask=mask,
        group_ids=torch.arange(groups).repeat_interleave(size),
        rewards=rewards,
    )
    signals = Signals(
        logprobs=logprobs,
        old_logprobs=logprobs - log_ratio,
        ref_logprobs=logprobs + 0.4 * torch.randn(rows, width, generator=g),
        entropies=2 * torch.rand(rows, width, generator=g),
    )
    return rollouts, signals


def agree(one: tuple[Tensor, Tensor], two: tuple[Tensor, Tensor]) -> None:
    """Assert equality of loss and gradient to 1e-6 in float32, and that there is a gradient to speak of."""
    assert one[1].dtype == torch.float32
    assert bool(one[1].abs().max() > 1e-3)
    torch.testing.assert_close(two[0], one[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(two[1], one[1], rtol=1e-6, atol=1e-6)


# -- whole trainers


def tokenizer() -> PreTrainedTokenizerFast:
    """One word per id; the tiny model's special ids."""
    words = {"<bos>": 0, "<eos>": 1, "<pad>": 2} | {f"w{i}": i for i in range(3, VOCABULARY)}
    made = Tokenizer(WordLevel(words, unk_token="<pad>"))
    made.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", padding_side="left"
    )


def _saved_model(folder: Any) -> str:
    """A tiny Llama on disk, from where TRL loads the reference too."""
    path = Path(folder) / "tiny-llama"
    tiny_llama(VOCABULARY).save_pretrained(path)
    return str(path)


Reward = Callable[..., Sequence[float | None]]


def grpo_trainer(
    folder: Any, reward: Reward, rollout: Callable[..., Any] | None = None, **settings: Any
) -> GRPOTrainer:
    """A whole GRPO trainer on a tiny Llama."""
    return GRPOTrainer(
        model=_saved_model(folder),
        reward_funcs=reward,
        args=grpo_config(folder, **settings),
        train_dataset=Dataset.from_dict({"prompt": [f"w{i} w{i + 1}" for i in range(3, 9)]}),
        processing_class=tokenizer(),
        rollout_func=rollout,
    )


def rloo_trainer(folder: Any, reward: Reward, **settings: Any) -> RLOOTrainer:
    """A whole RLOO trainer on a tiny Llama."""
    return RLOOTrainer(
        model=_saved_model(folder),
        reward_funcs=reward,
        args=RLOOConfig(output_dir=str(folder), **QUIET, **settings),
        train_dataset=Dataset.from_dict({"prompt": [f"w{i} w{i + 1}" for i in range(3, 9)]}),
        processing_class=tokenizer(),
    )
