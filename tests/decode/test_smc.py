"""SMC: weights are proper by enumeration, whatever is resampled and when; its limits are methods that are known."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from tests.decode.table_runs import Strings, close, table_run
from tests.tiny_models import TINY, tiny_llama
from tokenloom import decode
from tokenloom.decode.awrs import Awrs
from tokenloom.decode.run import Loop
from tokenloom.decode.smc import Smc
from tokenloom.decode.table import TableLM
from tokenloom.draw import RandomDraw, law_of

END = 2


def reward(prompt_ids: list[int], ids: list[int]) -> float:
    """Of prefixes, too; one string is forbidden."""
    return -math.inf if ids == [1, END] else 0.7 * ids.count(1) - 0.4 * len(ids) + 0.1 * len(prompt_ids)


class Alternating:
    """No token twice in a row; the end behind an odd one, and nowhere else."""

    name = "the constraint of alternation"

    def accept(self, prefix: Sequence[int], token: int) -> bool:
        if token == END:
            return len(prefix) > 0 and prefix[-1] == 1
        return not prefix or prefix[-1] != token


def weighed(loop: Any, table: TableLM, prompt: Sequence[int] = (0,), limit: int = 3) -> tuple[float, Strings]:
    """E[the estimated constant], and E[mean_i w_i 1{x_i = x}]."""

    def program(draw: Any) -> tuple[Any, ...]:
        loop.rows(table_run(table, [prompt], limit=limit, eos=[END], draw=draw))
        posterior = loop.posteriors[0]
        scale = math.exp(posterior.log_normalizer)
        return scale, *sorted((string, scale * share) for string, share in posterior.law().items())

    mean, total = 0.0, dict[tuple[int, ...], float]()
    for (scale, *pairs), mass in law_of(program).items():
        mean += mass * scale
        for string, weight in pairs:
            total[string] = total.get(string, 0.0) + mass * weight
    return mean, total


def tilted(table: TableLM, limit: int, strength: float = 1.0) -> Strings:
    law = table.string_law([0], limit, eos=END)
    return {y: p * math.exp(strength * reward([0], list(y))) for y, p in law.items() if y != (1, END)}


@pytest.mark.parametrize(
    ("resampling", "particles", "ess", "limit"),
    [
        ("systematic", 1, 0.5, 3),
        ("systematic", 2, 1.0, 3),
        ("systematic", 2, 0.7, 3),
        ("systematic", 3, 1.0, 2),
        ("stratified", 2, 1.0, 3),
        ("multinomial", 2, 1.0, 2),
        ("multinomial", 2, 0.7, 3),
    ],
)
def test_weights_are_proper_for_a_reward(resampling: Any, particles: int, ess: float, limit: int) -> None:
    table = TableLM.random(3, seed=6)
    loop = Smc(reward, particles=particles, ess=ess, resampling=resampling)
    mean, total = weighed(loop, table, limit=limit)
    target = tilted(table, limit)
    close(total, target)
    assert mean == pytest.approx(sum(target.values()), abs=1e-9)


@pytest.mark.parametrize(("ess", "block", "strength"), [(0.0, 1, 1.0), (1.0, 2, 1.0), (1.0, 3, 2.5), (0.0, 2, 0.5)])
def test_blocks_and_strength(ess: float, block: int, strength: float) -> None:
    table = TableLM.random(3, seed=8)
    loop = Smc(reward, particles=2, ess=ess, block=block, strength=strength)
    mean, total = weighed(loop, table)
    target = tilted(table, 3, strength)
    close(total, target)
    assert mean == pytest.approx(sum(target.values()), abs=1e-9)


@pytest.mark.parametrize("block", [1, 2, 4])
def test_a_constraint_conditions_on_whole_strings_within_the_limit(block: int) -> None:
    table = TableLM.random(3, seed=3)
    valid = {(1, END), (0, 1, END), (1, 0, 1, END)}
    law = table.string_law([0], 4, eos=END)
    mean, total = weighed(Smc(constraint=Alternating(), particles=2, ess=1.0, block=block), table, limit=4)
    close(total, {y: law[y] for y in valid})
    assert mean == pytest.approx(sum(law[y] for y in valid), abs=1e-9)
    both = Smc(reward, Alternating(), particles=2, ess=1.0, block=block)
    expected = {y: law[y] * math.exp(reward([0], list(y))) for y in valid - {(1, END)}}
    close(weighed(both, table, limit=4)[1], expected)


def test_with_masks_awrs_is_the_same_method() -> None:
    table = TableLM.random(3, seed=3)

    def law(make: Any) -> Strings:
        return law_of(lambda draw: tuple(make().rows(table_run(table, [(0,)], limit=3, eos=[END], draw=draw))[0]))

    ours = law(lambda: Smc(constraint=Alternating(), particles=2, ess=0.8))
    close(ours, law(lambda: Awrs(Alternating(), particles=2, ess=0.8, mode="mask")))
    # Where both particles run into the limit, what is left is their beginning.
    assert set(ours) == {(1, END), (0, 1, END), (1, 0)}


def test_one_particle_is_plain_sampling() -> None:
    table = TableLM.random(3, seed=1)

    def program(draw: Any) -> tuple[int, ...]:
        loop = Smc(lambda prompt_ids, ids: float(sum(ids)), particles=1)
        return tuple(loop.rows(table_run(table, [(0,)], limit=3, eos=[END], draw=draw))[0])

    close(law_of(program), table.string_law([0], 3, eos=END))


def test_rows_of_a_batch_are_independent() -> None:
    table = TableLM.random(2, seed=4)

    def law(*prompts: tuple[int, ...]) -> dict[Any, float]:
        return law_of(
            lambda draw: tuple(
                map(tuple, Smc(reward, particles=2, ess=1.0).rows(table_run(table, prompts, limit=2, draw=draw)))
            )
        )

    alone = [law((0,)), law((1, 1))]
    close(law((0,), (1, 1)), {(*a, *b): p * q for a, p in alone[0].items() for b, q in alone[1].items()})


def test_many_particles_come_near_the_target() -> None:
    table = TableLM.random(3, seed=6)
    target = tilted(table, 3)
    loop = Smc(reward, particles=2000)
    loop.rows(table_run(table, limit=3, eos=[END], draw=RandomDraw(torch.Generator().manual_seed(0))))
    constant = sum(target.values())
    assert math.exp(loop.posteriors[0].log_normalizer) == pytest.approx(constant, rel=0.05)
    law = loop.posteriors[0].law()
    assert sum(abs(law.get(y, 0) - p / constant) for y, p in target.items()) / 2 < 0.06


def test_a_dead_end_gives_the_prefix_and_no_weight() -> None:
    class Trap:
        def accept(self, prefix: Sequence[int], token: int) -> bool:
            return len(prefix) < 2 and token == 0

    table = TableLM.random(3, seed=2)
    loop = Smc(constraint=Trap(), particles=3, block=2)
    assert loop.rows(table_run(table, limit=6, eos=[END])) == [[0, 0]]
    assert loop.posteriors[0].log_normalizer == -math.inf
    assert loop.posteriors[0].law() == {}
    nothing = Smc(lambda prompt_ids, ids: -math.inf, particles=3)
    rows = nothing.rows(table_run(table, limit=6, eos=[END]))
    assert len(rows[0]) == 1
    assert nothing.posteriors[0].log_normalizer == -math.inf


@pytest.mark.parametrize("name", sorted(TINY)[:4])
def test_under_generate_with_padding(name: str) -> None:
    class Even:
        def accept(self, prefix: Sequence[int], token: int) -> bool:
            return len(prefix) == 4 if token == 1 else len(prefix) < 4 and token % 2 == 0

    ids = torch.tensor([[2, 2, 5, 9, 4], [2, 8, 3, 11, 6]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    options = {"attention_mask": mask, "do_sample": True, "top_k": 0, "max_new_tokens": 9, "eos_token_id": 1,
               "pad_token_id": 0}  # fmt: skip
    asked = []

    def count(prompt_ids: list[int], new: list[int]) -> float:
        asked.append((tuple(prompt_ids), tuple(new)))
        return 0.3 * new.count(4)

    loop: Loop = decode.loop("smc", constraint=Even(), reward=count, particles=4, block=2)
    loop.draw = RandomDraw(torch.Generator().manual_seed(0))
    out = TINY[name]().generate(ids, custom_generate=loop, **options)
    for row in out[:, 5:].tolist():
        new = row[: row.index(1)]
        assert len(new) == 4
        assert all(t % 2 == 0 for t in new)
    assert {prompt for prompt, _ in asked} == {(5, 9, 4), (2, 8, 3, 11, 6)}
    assert {len(new) for _, new in asked} == {2, 4, 5}
    assert loop.last_run is not None
    assert loop.last_run.counts["candidates"] == 2 * 4 * 3


def test_a_reward_draws_responses_its_way() -> None:
    model = tiny_llama(vocab=12)
    ids = torch.tensor([[5, 9, 4]])

    def fives(**settings: Any) -> float:
        loop = decode.loop("smc", reward=lambda prompt_ids, new: float(new.count(5)), **settings)
        loop.draw = RandomDraw(torch.Generator().manual_seed(0))
        out = model.generate(ids.repeat(20, 1), do_sample=True, top_k=0, max_new_tokens=6, eos_token_id=None,
                             custom_generate=loop)  # fmt: skip
        return float((out[:, 3:] == 5).float().mean())

    assert fives(particles=16, strength=3.0) > 2 * fives(particles=1)


def test_misuse_is_named() -> None:
    with pytest.raises(ValueError, match="a reward, a constraint, or both"):
        decode.loop("smc")
    for name, wrong in (("particles", 0), ("ess", 1.5), ("ess", math.nan), ("block", 0), ("strength", 0.0)):
        with pytest.raises(ValueError, match=f"smc: {name} .*got {wrong}"):
            decode.loop("smc", reward=reward, **{name: wrong})
    with pytest.raises(ValueError, match="not allowed; it takes one of systematic, stratified, multinomial"):
        decode.loop("smc", reward=reward, resampling="residual")
    table = TableLM.random(3)
    with pytest.raises(ValueError, match="do_sample=True"):
        Smc(reward).rows(table_run(table, sample=False))
    with pytest.raises(ValueError, match="below infinity"):
        Smc(lambda prompt_ids, ids: math.inf).rows(table_run(table))

    class Never:
        name = "the constraint that nothing fulfills"

        def accept(self, prefix: Sequence[int], token: int) -> bool:
            return False

    with pytest.raises(ValueError, match="the constraint that nothing fulfills allows no first token"):
        Smc(constraint=Never()).rows(table_run(table, eos=[END]))
