"""The token view's share of a page: rows as JSON, a table of pieces, and packed numbers that the page inflates.

A variant is a set of quantities: "as trained" is what the dump says; any other is an algorithm that was asked about
the stored rows, or stands there with the reason why it could not be.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from typing import Any

from tokenloom.report.encode import index_blob, packed, quantity_blob
from tokenloom.report.read import RunData
from tokenloom.report.replay import OWN, QUANTITIES, Replayed, covers_its_batch, replay
from tokenloom.report.tokens import MAX_RESPONSES, MAX_TOKENS, TokenDump, TokenRow

AS_TRAINED = "as trained"
MAX_BYTES = 28_000_000
"""Numbers in a page before base64 makes four characters of three of them: 40 MB with everything else."""


def token_payload(run: RunData, compare: Sequence[str]) -> tuple[dict[str, Any], dict[str, str]]:
    """What a page holds of the dumped responses: JSON data, and blobs by name.

    Raises:
        ValueError: when `compare` names an unknown preset.
    """
    dump = run.tokens
    asked = replayed(run, dump.rows, compare)
    names = list(dict.fromkeys(name for row in dump.rows for name in row.quantities))
    rows = _within(dump.rows, 5 + len(names) + len(QUANTITIES) * len(asked))
    blobs: dict[str, str] = {}
    pieces: dict[tuple[int | None, str], int] = {}
    if rows:
        keys = ((i, p) for r in rows for i, p in zip(r.ids, r.pieces, strict=True))
        blobs["index"] = index_blob(pieces.setdefault(key, len(pieces)) for key in keys)
        blobs["mask"] = packed(bytes(int(m) for r in rows for m in r.mask))
    for name in names:
        blobs[f"0/{name}"] = quantity_blob(row.quantities.get(name) or _unknown(row) for row in rows)
    variants = [{"name": AS_TRAINED, "about": _description(run), "reason": "", "quantities": names}]
    for number, one in enumerate(asked, 1):
        told = [] if one.reason else list(QUANTITIES)
        for name in told:
            blobs[f"{number}/{name}"] = quantity_blob(variant_values(one, row, name) for row in rows)
        variants.append({"name": one.name, "about": list(one.about), "reason": one.reason, "quantities": told})
    return _header(dump, rows, pieces, variants), blobs


def replayed(run: RunData, rows: Sequence[TokenRow], compare: Sequence[str]) -> list[Replayed]:
    """The algorithms to compare with; the run's own is asked too where its dump is only a part of a batch."""
    folders = list(dict.fromkeys(row.stored for row in rows if row.stored))
    if not compare:
        return []
    names = [*compare]
    if folders and not all(covers_its_batch(run.path, f) for f in folders):
        names = [OWN, *compare]
    return replay(run.path, folders, names, run.recipe)


def variant_values(one: Replayed, row: TokenRow, quantity: str) -> array[float]:
    """What an algorithm would have done with a row's tokens; NaN where its batch was not stored."""
    held = one.values.get(row.stored, {}).get(quantity)
    if held is None or row.row >= held.shape[0]:
        return _unknown(row)
    told = array("f", held[row.row, : len(row.pieces)].tolist())
    return told + array("f", [math.nan] * (len(row.pieces) - len(told)))


def _within(rows: Sequence[TokenRow], width: int) -> Sequence[TokenRow]:
    """As many of the last rows as `MAX_BYTES` hold at `width` bytes a token, at least one."""
    left = MAX_BYTES // width
    kept = 0
    for row in reversed(rows):
        left -= len(row.pieces)
        if left < 0 and kept:
            break
        kept += 1
    return rows[len(rows) - kept :]


def _unknown(row: TokenRow) -> array[float]:
    return array("f", [math.nan] * len(row.pieces))


def _description(run: RunData) -> list[str]:
    algorithm = run.info.get("algorithm")
    lines = algorithm.get("description", []) if isinstance(algorithm, dict) else []
    return [str(line) for line in (lines if isinstance(lines, list) else [lines])]


def _header(
    dump: TokenDump, rows: Sequence[TokenRow], pieces: dict[tuple[int | None, str], int], variants: list[dict[str, Any]]
) -> dict[str, Any]:
    prompts = {prompt: i for i, prompt in enumerate(dict.fromkeys(r.prompt for r in rows))}
    return {
        "prompts": list(prompts),
        "pieces": [[i, text] for i, text in pieces],
        "variants": variants,
        "rows": [
            {
                "step": r.step,
                "row": r.row,
                "group": r.group,
                "prompt": prompts[r.prompt],
                "answer": r.answer,
                "reward": r.reward,
                "length": len(r.pieces),
                "entropy": _mean(r),
                "omitted": r.omitted,
            }
            for r in rows
        ],
        "total": dump.total,
        "steps": dump.steps,
        "maxTokens": MAX_TOKENS,
        "maxResponses": MAX_RESPONSES,
    }


def _mean(row: TokenRow) -> float | None:
    """Mean entropy of the sampled tokens."""
    told = row.quantities.get("entropy", array("f"))
    known = [v for v, sampled in zip(told, row.mask, strict=False) if sampled and v == v]
    return sum(known) / len(known) if known else None
