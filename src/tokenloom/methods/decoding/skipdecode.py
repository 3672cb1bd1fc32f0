"""SkipDecode: fewer layers the further the generation is, the same for all rows of a batch (arXiv 2307.02628).

n(t) = round(n_max - (n_max - n_min) min(t / T_max, 1))              layers that read generated token t; prompts n_max
executed: the first w layers and the last n(t) - w; the hidden state passes the others unchanged.

As n(t) never grows, the layers of a later token are among those of every earlier one: each layer that runs has keys
and values of all tokens before. Cost relative to the full model: sum_t n(t) / Lyr / T.
Limit: n_min = n_max = Lyr is the model itself. Deviations: none known; meant for models tuned to it, others lose
quality. Fidelity: reconstructed.
"""

from __future__ import annotations

from tokenloom.catalog import part

PAPER = "arXiv:2307.02628"


@part("skipdecode", stage="search", scope="batch", paper=PAPER)
def active_layers(
    position: int, total: int, *, warmup: int = 1, least: int = 0, most: int = 0, over: int = 256
) -> list[int]:
    """Indices, rising, of the layers of `total` that read generated token `position` (below 0: the prompt).

    `most` = 0 stands for all layers, `least` = 0 for half of `most`; `over` is T_max.

    Raises:
        ValueError: unless 1 <= warmup < least <= most <= total and over >= 1.
    """
    most = most or total
    least = least or max(most // 2, warmup + 1)
    if not 1 <= warmup < least <= most <= total or over < 1:
        raise ValueError(
            f"skipdecode: needs 1 <= warmup < least <= most <= {total} layers and over >= 1, got warmup {warmup}, "
            f"least {least}, most {most}, over {over}"
        )
    share = min(max(position, 0) / over, 1.0)
    count = int(most - (most - least) * share + 0.5)
    return [*range(warmup), *range(total - (count - warmup), total)]


@part("skipdecode/cost", stage="analysis", scope="batch", paper=PAPER)
def relative_cost(tokens: int, total: int, *, warmup: int = 1, least: int = 0, most: int = 0, over: int = 256) -> float:
    """Layers executed for `tokens` generated tokens, as a share of those of the full model."""
    settings = {"warmup": warmup, "least": least, "most": most, "over": over}
    return sum(len(active_layers(t, total, **settings)) for t in range(tokens)) / (total * max(tokens, 1))
