"""Final-token preference optimization: a model learns from where the Antislop sampler went back (arXiv 2510.15061).

    loop = decode.loop("antislop", tokenizer=tokenizer, phrases=["tapestry"])
    pairs = collect(policy, prompts, loop, max_tokens=200)      # or pairs_of(loop.corrections) after any `generate`
    write_pairs(pairs, "pairs.jsonl", tokenizer)                # a line each; read_pairs reads them again
    trained = fit_ftpo(policy.model, balanced(pairs))

A pair is a context, the token that began something banned there, and the tokens that could stand instead. The loss,
`methods.decoding.antislop.ftpo_loss`, reads the logits behind the context only; its reference is the model as it is
when training begins, kept as one hidden state a pair.

Deviations from the release: input embeddings and the output layer are not trained, so that the reference's logits come
from its hidden states; the step size is given, not derived from the number of pairs. Fidelity: code (loss), paper.
"""

from tokenloom.decode.ftpo.pairs import Pair as Pair
from tokenloom.decode.ftpo.pairs import balanced as balanced
from tokenloom.decode.ftpo.pairs import collect as collect
from tokenloom.decode.ftpo.pairs import pairs_of as pairs_of
from tokenloom.decode.ftpo.pairs import read_pairs as read_pairs
from tokenloom.decode.ftpo.pairs import write_pairs as write_pairs
from tokenloom.decode.ftpo.training import FtpoQuality as FtpoQuality
from tokenloom.decode.ftpo.training import Trained as Trained
from tokenloom.decode.ftpo.training import fit_ftpo as fit_ftpo
