"""`Policy`: a Hugging Face causal LM seen as a policy."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from tokenloom.batch import Rollouts
from tokenloom.kernels.accumulation import accumulating
from tokenloom.policy import loading, lora
from tokenloom.policy.attention_signals import run_attention_signals
from tokenloom.policy.chat import encode_prompt, end_ids, padding_id
from tokenloom.policy.chunks import run_chunk_signals
from tokenloom.policy.config import ModelConfig
from tokenloom.policy.dropout import zero_dropouts
from tokenloom.policy.forward import PaddedForward, rotation_reach
from tokenloom.policy.group_signals import hidden_by_token, run_group_signals
from tokenloom.policy.head import LogprobHead
from tokenloom.policy.interface import Forward, Gathered
from tokenloom.policy.lean_training import forms_that_fit, lean_training
from tokenloom.policy.needs import Needs
from tokenloom.policy.own_logits import run_trunk, trunk_of
from tokenloom.policy.reference import Reference
from tokenloom.policy.saving import VALUE_HEAD_FILE, save_policy
from tokenloom.policy.scatter import Scatter
from tokenloom.policy.selftest import self_test
from tokenloom.policy.tree_forward import MaskKinds, TreeForward
from tokenloom.policy.value_head import ValueHead
from tokenloom.signals import Signals

log = logging.getLogger(__name__)


class Policy:
    """A causal LM with its tokenizer: signals out, gradients in, prompts to ids, weights to disk.

    `model` is a Hugging Face causal LM; with `config.lora` it is wrapped by PEFT and `model` becomes
    the wrapped one. `source` is where the initial weights can be read again. Dropouts are set to
    zero and the model stays in evaluation mode, in training too: sampling and training are the
    same function of the weights. Not safe for concurrent use from several threads.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        config: ModelConfig | None = None,
        *,
        device: str | torch.device | None = None,
        seed: int = 0,
        source: str | None = None,
    ) -> None:
        self.config = config or ModelConfig()
        self.device = torch.device(device) if device is not None else next(model.parameters()).device
        self.tokenizer, self.source = tokenizer, source
        self.causal: Any = model.to(self.device).eval()
        dropped = zero_dropouts(self.causal)
        if dropped:
            log.info("dropout off (%s): sampling and training use the same policy", ", ".join(dropped))
        self.eos_ids, self.pad_id = end_ids(model, tokenizer), padding_id(model, tokenizer)
        self.model: Any = self.causal
        if self.config.lora is not None:
            self.model = lora.add_lora(self.causal, self.config.lora, seed=seed).eval()
        self.trunk = trunk_of(self.causal)
        self.head = LogprobHead(self.causal, chunk_rows=self.config.chunk_rows)
        self.value_head: ValueHead | None = None
        if self.config.value_head is not None:
            size = int(self.causal.config.get_text_config().hidden_size)
            self.value_head = ValueHead(size, detach=self.config.value_head.detach, device=self.device)
        forms = forms_that_fit(self.causal, torch.bfloat16 if self.config.autocast == "bf16" else None)
        self._lean_forms = forms
        if self.config.gradient_checkpointing:
            model = self.causal
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            # What is computed again, in the backward, must be the same code as the first time.
            enable({"use_reentrant": False, "context_fn": lambda: (nullcontext(), lean_training(forms))})
        budget = self.config.token_budget or (2048 if self.device.type == "cpu" else 16384)
        reach = rotation_reach(self.causal.config)
        padded = partial(PaddedForward, self.device, token_budget=budget, reach=reach)
        self.forward: Forward = padded()
        kinds = MaskKinds.from_config(self.causal.config)
        sharing = self.config.share_prefixes
        self.masks_tell = True  # all that attention sees, as far as is known; sampling asks, too
        if self.config.self_test:
            result = self_test(self.causal, self.head, kinds)
            result.warn(type(self.causal).__name__)
            kinds = result.kinds
            self.forward = padded(exact=not result.forward_agrees)
            self.head.fused &= result.head_agrees
            self.masks_tell = result.tree_agrees
            sharing &= result.tree_agrees and result.forward_agrees
        if sharing:
            weights = next(self.causal.parameters()).dtype
            dtype = torch.bfloat16 if self.config.autocast == "bf16" else weights
            self.forward = TreeForward(self.device, kinds, token_budget=budget, dtype=dtype, reach=reach)
        self.reference = Reference(self.model, self.head, self._read_again if source is not None else None)

    @classmethod
    def load(
        cls,
        name_or_path: str | Path | None = None,
        config: ModelConfig | None = None,
        *,
        device: str | torch.device | None = None,
        seed: int = 0,
    ) -> Self:
        """Load by built-in name, local folder or Hub name (default: `config.name`) onto `device`.

        `seed` draws the initial adapters under LoRA. A folder written by `save` brings its value head along.

        Raises:
            ValueError: for an unknown model or one that is no decoder-only causal LM.
            FileNotFoundError: for the built-in model when its package is not installed.
        """
        config = config or ModelConfig()
        source = loading.resolve(name_or_path if name_or_path is not None else config.name)
        place = loading.pick_device(device)
        model = loading.load_model(source, config, place)
        tokenizer = loading.load_tokenizer(source)
        policy = cls(model, tokenizer, config, device=place, seed=seed, source=source)
        critic = Path(source) / VALUE_HEAD_FILE
        if policy.value_head is not None and critic.is_file():
            from safetensors.torch import load_file

            policy.value_head.load_state_dict(load_file(critic))
        return policy

    # -- signals and gradients ---------------------------------------------------------------

    def signals(
        self,
        rollouts: Rollouts,
        needs: Sequence[str],
        *,
        grad: bool = False,
        given: Mapping[str, Tensor] | None = None,
    ) -> Signals:
        """Exactly the signals named in `needs`, [B, T], on the rollouts' device, zero off the mask.

        Known names: the fields of `Signals` and the registered chunk signals. `old_logprobs` and
        `old_values` are those of the current weights, without gradient; call this at the start of
        an update and keep them. Log-probs and entropies are at `rollouts.sampling.temperature`
        (1 for greedy). With `grad`, `logprobs`, `entropies`, `values` and chunk signals carry gradients; group and
        attention signals never do.
        `given` holds signals taken earlier, [B, T] or [B, T, K] by name, that chunk signals take as inputs; those
        missing are taken now, without gradient.

        Raises:
            ValueError: for an unknown name, or values without a value head.
        """
        wanted = Needs.parse(needs, has_values=self.value_head is not None)
        given = dict(given or {})
        if missing := sorted(wanted.given - given.keys()):
            given |= self.signals(rollouts, missing).extras
        temperature = rollouts.sampling.temperature or 1.0
        scatter = Scatter(rollouts)
        reference: list[Gathered] = []
        if wanted.reference:
            with torch.no_grad(), self.autocast(), self.reference.active() as (trunk, head):
                for part in self.forward.gather(partial(run_trunk, trunk), rollouts):
                    if wanted.ref_logprobs:
                        law = head(part.hidden, scatter.targets(part), rows=part.at, temperature=temperature)
                        scatter.put("ref_logprobs", part, law.logprobs)
                    if wanted.ref_logits:
                        reference.append(part)
        if wanted.policy:
            with torch.set_grad_enabled(grad), self.autocast(), self._recomputing(grad), self._lean(grad):
                parts = self.forward.gather(partial(run_trunk, self.trunk), rollouts)
                if wanted.chunk_signals and not bool(rollouts.mask.any()):
                    # Nobody knows how wide a signal is before it has spoken once.
                    parts = iter([self._nothing()])
                for i, part in enumerate(parts):
                    ref_hidden = reference[i].states if reference else None
                    held = {name: scatter.gather(given[name], part) for name in wanted.given}
                    self._policy_signals(wanted, scatter, part, temperature, ref_hidden, held)
        with torch.no_grad(), self.autocast():
            run = partial(run_trunk, self.trunk)
            if wanted.group_signals:
                hidden = hidden_by_token(self.forward.gather(run, rollouts), rollouts)
                logits = partial(self.head.logits, temperature=temperature)
                scatter.put_whole(run_group_signals(wanted.group_signals, rollouts, hidden, logits))
            if wanted.attention_signals:
                scatter.put_whole(
                    run_attention_signals(wanted.attention_signals, self.causal, run, rollouts, self.device)
                )
        return scatter.signals(wanted, grad=grad)

    def _policy_signals(
        self,
        wanted: Needs,
        scatter: Scatter,
        part: Gathered,
        temperature: float,
        ref_hidden: Tensor | None,
        given: Mapping[str, Tensor],
    ) -> None:
        targets = scatter.targets(part)
        if wanted.head:
            law = self.head(part.hidden, targets, rows=part.at, temperature=temperature, need_entropy=wanted.entropies)
            scatter.put("logprobs", part, law.logprobs)
            if law.entropies is not None:
                scatter.put("entropies", part, law.entropies)
        if wanted.values and self.value_head is not None:
            scatter.put("values", part, self.value_head(part.states))
        if wanted.chunk_signals:
            ref_head = self.reference.head() if wanted.ref_logits else None
            results = run_chunk_signals(
                wanted.chunk_signals,
                part.states,
                targets,
                logits=partial(self.head.logits, temperature=temperature),
                ref_hidden=ref_hidden,
                ref_logits=None if ref_head is None else partial(ref_head.logits, temperature=temperature),
                given=given,
                chunk_rows=self.head.chunk_rows,
            )
            for name, values in results.items():
                scatter.put(name, part, values)

    def _nothing(self) -> Gathered:
        """A part without tokens."""
        none = torch.zeros(0, dtype=torch.int64, device=self.device)
        weight = next(self.causal.parameters())
        return Gathered(weight.new_zeros(0, int(self.causal.config.get_text_config().hidden_size)), none, none)

    def micro_batches(self, rollouts: Rollouts, token_budget: int) -> list[Tensor]:
        """Rows [n_i] of micro-batches of at most about `token_budget` computed tokens; rows that share a prefix stay
        together, and rows without a sampled token are left out.
        """
        return self.forward.split(rollouts, token_budget)

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a scalar `loss` to `.grad` of the trainable parameters.

        Raises:
            ValueError: when the loss depends on no signal taken with `grad=True`.
        """
        if not loss.requires_grad:
            raise ValueError("the loss carries no gradient: compute it from policy.signals(rollouts, needs, grad=True)")
        with accumulating():
            loss.backward()  # type: ignore[no-untyped-call]  # torch's method is not annotated

    def prepare(self, needs: Sequence[str]) -> None:
        """Make ready what `needs` will take: checks the names and freezes the reference model now.

        Raises:
            ValueError: as `signals` does.
        """
        if Needs.parse(needs, has_values=self.value_head is not None).reference:
            self.reference.head()

    @contextmanager
    def frozen(self) -> Iterator[Self]:
        """The policy as it was at load, for sampling from; only valid inside the context."""
        with self.reference.active() as (trunk, head):
            if lora.is_lora(self.model):
                yield self
                return
            other = copy.copy(self)
            other.model = other.causal = head.causal
            other.trunk, other.head = trunk, head
            yield other

    def _read_again(self) -> nn.Module:
        model = loading.load_model(cast(str, self.source), self.config, self.device).to(self.device)
        zero_dropouts(model)
        return cast(nn.Module, model)

    # -- modes -------------------------------------------------------------------------------

    def autocast(self) -> AbstractContextManager[Any]:
        """The number format of matrix products, for sampling and training alike."""
        if self.config.autocast == "bf16":
            # Casts are kept until the context ends, a second copy of the weights. Layers that are computed again
            # cast again, so what checkpointing is to save would go into casts that serve one product each.
            recomputed = self.config.gradient_checkpointing and torch.is_grad_enabled()
            return torch.autocast(self.device.type, dtype=torch.bfloat16, cache_enabled=not recomputed)
        return nullcontext()

    def _lean(self, grad: bool) -> AbstractContextManager[None]:
        return lean_training(self._lean_forms) if grad else nullcontext()

    @contextmanager
    def _recomputing(self, grad: bool) -> Iterator[None]:
        """Gradient checkpointing for one forward: `transformers` ties it to training mode, never used here.

        Only the flags of the modules that checkpoint are set, not those of their children.
        """
        modules = []
        if grad and self.config.gradient_checkpointing:
            modules = [m for m in self.causal.modules() if getattr(m, "gradient_checkpointing", False)]
        try:
            for module in modules:
                module.training = True
            yield
        finally:
            for module in modules:
                module.training = False

    # -- parameters, prompts, disk -----------------------------------------------------------

    def trainable_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Name and parameter of all that trains: the model (its adapters under LoRA) and the value head."""
        found = [(f"model.{n}", p) for n, p in self.model.named_parameters() if p.requires_grad]
        if self.value_head is not None:
            found += [(f"value_head.{n}", p) for n, p in self.value_head.named_parameters()]
        return found

    def state_dict(self) -> dict[str, Tensor]:
        """The trainable parameters' values by name; they share memory with the policy."""
        return {name: parameter.detach() for name, parameter in self.trainable_parameters()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Copy values back into the trainable parameters.

        Raises:
            ValueError: when names or shapes differ.
        """
        own = dict(self.trainable_parameters())
        if own.keys() != state.keys():
            missing, extra = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
            raise ValueError(
                f"the state is of another policy: it lacks {missing[:3]} and has unknown {extra[:3]}; "
                "load the model with the same name and the same lora and value_head sections"
            )
        with torch.no_grad():
            for name, parameter in own.items():
                if parameter.shape != state[name].shape:
                    raise ValueError(f"{name} has shape {tuple(state[name].shape)}, expected {tuple(parameter.shape)}")
                parameter.copy_(state[name])

    def encode_prompt(self, prompt: str | Sequence[Mapping[str, str]]) -> Tensor:
        """int64 [P] ids of chat messages or of a plain text; see `chat.encode_prompt`."""
        return encode_prompt(self.tokenizer, prompt)

    def save(self, folder: str | Path, *, adapter_only: bool = False) -> None:
        """Write an ordinary Hugging Face folder; adapters are merged unless `adapter_only`. See `saving`."""
        save_policy(self.model, self.tokenizer, self.value_head, Path(folder), adapter_only=adapter_only)
