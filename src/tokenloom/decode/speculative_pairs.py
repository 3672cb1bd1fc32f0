"""The published pairs of a drafter and a verifier, each a loop by its method's name; see `speculative`."""

from __future__ import annotations

from typing import Any, Literal

from tokenloom.decode.registry import build, decoder
from tokenloom.decode.speculative import Speculative


@decoder("speculative-sampling", kind="loop")
def speculative_sampling(draft: Any, *, drafts: int = 4, nodes: int | None = None) -> Speculative:
    """A chain of at most `drafts` tokens of a smaller model `draft`, accepted with probability min(1, p/q)."""
    from tokenloom.decode.drafters.draft_model import DraftModel

    return Speculative(DraftModel(draft, width=1, depth=drafts), "speculative-sampling", nodes=nodes)


@decoder("recursive-rejection", kind="loop")
def recursive_rejection(
    draft: Any, *, drafts: int = 4, depth: int = 4, replacement: bool = False, nodes: int | None = None
) -> Speculative:
    """A tree of a smaller model `draft`, of at most `drafts` children a node, each with its chance."""
    from tokenloom.decode.drafters.draft_model import DraftModel

    verifier = build("verifier", "recursive-rejection", replacement=replacement)
    return Speculative(DraftModel(draft, width=drafts, depth=depth), verifier, nodes=nodes)


@decoder("spec-tr", kind="loop")
def spec_tr(draft: Any, *, drafts: int = 8, depth: int = 8, nodes: int | None = None) -> Speculative:
    """At most `drafts` independent continuations of a smaller model `draft`, one taken by optimal transport."""
    from tokenloom.decode.drafters.draft_model import DraftModel

    return Speculative(DraftModel(draft, width=drafts, depth=depth), "spec-tr", nodes=nodes)


@decoder("two-step-multi-draft", kind="loop")
def two_step_multi_draft(
    draft: Any, *, drafts: int = 2, depth: int = 4, support: int = 0, nodes: int | None = None
) -> Speculative:
    """A tree of a smaller model `draft`, of at most `drafts` children a node: one is picked, then verified."""
    from tokenloom.decode.drafters.draft_model import DraftModel

    verifier = build("verifier", "two-step-multi-draft", support=support)
    return Speculative(DraftModel(draft, width=drafts, depth=depth), verifier, nodes=nodes)


@decoder("prompt-lookup", kind="loop")
def prompt_lookup(*, longest: int = 3, shortest: int = 1, drafts: int = 10, nodes: int | None = None) -> Speculative:
    """What followed the same tokens earlier in the text, as far as it comes true again."""
    from tokenloom.decode.drafters.lookup import PromptLookup

    return Speculative(PromptLookup(longest=longest, shortest=shortest, drafts=drafts), "prompt-lookup", nodes=nodes)


@decoder("token-recycling", kind="loop")
def token_recycling(
    *, branches: int = 8, template: Literal["grown", "paper"] = "grown", nodes: int | None = None
) -> Speculative:
    """A tree of the tokens that were likeliest after each token when it was last read."""
    return Speculative(
        build("drafter", "token-recycling", branches=branches, template=template), "prompt-lookup", nodes=nodes
    )


@decoder("stand", kind="loop")
def stand(*, longest: int = 4, kept: int = 10, nodes: int | None = None) -> Speculative:
    """A tree drawn without replacement from the laws that followed the same n-gram before."""
    from tokenloom.decode.drafters.stand import Stand

    return Speculative(Stand(longest=longest, kept=kept), "recursive-rejection", nodes=nodes)
