"""Terms over a corpus, items from plain text and their tiers: what a step draws, its gradient, kill and resume."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tokenloom.batch import Rollouts
from tokenloom.tasks import Item, Task, load_task
from tokenloom.tasks.config import TaskConfig, TierConfig
from tokenloom.tasks.sources.corpus import documents, name_of, shown
from tokenloom.train.corpus import CorpusConfig, CorpusStream
from tokenloom.train.data import PromptStream
from tokenloom.train.recipe import Recipe, RecipeError, build_recipe, load_recipe
from tokenloom.train.session import Session
from train.setups import EVAL, Tiny, lines, same_results, steps, train

TEXT = "01 23 012 3 0 11 20 3 1 2 33 0 1 0 0 2 103 2 1 1 0 3 20 3 2 1 0 01 2 3 31 2 0 1 0 0 3 2 1 1\n"
TIERS = {"first": {"easy": 1.0, "hard": 0.0}, "last": {"easy": 0.25, "hard": 0.75}, "begin": 0.25, "end": 0.75}


def reading(tiny: Tiny, folder: Path, **sections: Any) -> dict[str, Any]:
    """A recipe that learns the digits of a text: every answer a word, the rows of the corpus short."""
    text = folder / "text.txt"
    text.write_text(TEXT, encoding="utf-8")
    (folder / "other.txt").write_text("3 2 1 0 3 2 1 0 3 2 1 0", encoding="utf-8")
    data = tiny.data(algorithm={"preset": "rmt", "budget": 4.0}, rollout={"prompts_per_step": 3})
    data["task"] = {
        "source": f"corpus:{text}", "tiers": TIERS, "workers": 1,
        "params": {"min_words": 4, "context": 20, "budget": 4, "instruction": "{budget}"},
        "heldout": {"source": f"corpus:{folder / 'other.txt'}"},
        "rewards": [{"verifier": "number"}],
    }  # fmt: skip
    data["corpus"] = {"path": str(text), "rows_per_step": 3, "max_tokens": 9}
    for name, value in sections.items():
        data[name] = data[name] | value if isinstance(value, dict) else value
    return data


def stream(tiny: Tiny, folder: Path, **settings: Any) -> CorpusStream:
    from cli.tiny_run import tiny_tokenizer

    text = folder / "text.txt"
    text.write_text(TEXT, encoding="utf-8")
    return CorpusStream(CorpusConfig(path=str(text), **settings), tiny_tokenizer(), seed=0)


# -- rows of text


def test_an_epoch_predicts_every_token_but_the_first_once(tiny: Tiny, tmp_path: Path) -> None:
    rows = stream(tiny, tmp_path, rows_per_step=1, max_tokens=9)
    ids = [t for _, row, _ in rows.rows for t in row[1:]]
    first = rows.rows[0][1][0]
    assert len(ids) == len(TEXT) - 1
    characters = "0123+= \x1b"
    assert "".join(characters[t - 4] if t > 3 else "\n" for t in [first, *ids]) == TEXT
    count = len(rows.rows)
    for epoch in range(2):
        drawn = [int(rows.draw(epoch * count + i).group_ids) for i in range(count)]
        assert sorted(drawn) == list(range(count))
        assert drawn != list(range(count))
    assert [int(rows.draw(i).group_ids) for i in range(count)] != drawn


def test_a_draw_depends_on_seed_and_step_alone(tiny: Tiny, tmp_path: Path) -> None:
    first, again = (stream(tiny, tmp_path, rows_per_step=5, max_tokens=9) for _ in range(2))
    ahead = [first.draw(step).group_ids.tolist() for step in range(6)]
    assert [again.draw(step).group_ids.tolist() for step in reversed(range(6))] == ahead[::-1]
    again.seed = 1
    assert again.draw(0).group_ids.tolist() != ahead[0]


def test_tokens_of_the_steps_items_are_left_to_them(tiny: Tiny, tmp_path: Path) -> None:
    rows = stream(tiny, tmp_path, rows_per_step=1, max_tokens=1000)
    task = load_task(TaskConfig.model_validate(reading(tiny, tmp_path)["task"]))
    items = list(task.train[:4])
    drawn = rows.draw(0, items)
    held = {c for item in items for c in range(*item.metadata["span"])}
    # One token a character here: entry t speaks of character t + 1. Together they cover all but the first.
    assert {t + 1 for t in (~drawn.mask[0]).nonzero().reshape(-1).tolist()} == held
    assert bool(rows.draw(0).mask.all())
    elsewhere = [Item(prompt="p", metadata=item.metadata | {"document": name_of("another")}) for item in items]
    assert bool(rows.draw(0, elsewhere).mask.all())


# -- items and tiers


def test_items_say_where_their_answer_stands(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    texts = ["the cat and the dog and the {budget} bird sang", "the dog and the moth slept"]
    file.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts), encoding="utf-8")
    config = TaskConfig(source=f"corpus:{file}", params={"min_words": 3, "budget": 100}, heldout=1)
    task = load_task(config)
    items = [*task.train, *task.heldout]
    assert len(items) == 7 + 3
    by_name = {name_of(t): t for t in documents(str(file))}
    for item in items:
        text, (begin, end) = by_name[item.metadata["document"]], item.metadata["span"]
        assert text[begin:end] == item.answer
        assert item.text.endswith(text[:begin].rstrip())
    tiers = {item.answer: item.metadata["tier"] for item in items}
    # 16 words, thirds at 5.33 and 10.67. By frequency: "the" from 0, "and" from 5, "dog" from 8, "bird" from 10,
    # "budget" from 11.
    assert tiers == {
        "the": "easy", "and": "easy", "dog": "medium", "bird": "medium",
        "budget": "hard", "sang": "hard", "moth": "hard", "slept": "hard",
    }  # fmt: skip


def test_the_prompt_states_the_budget_of_the_moment(tiny: Tiny, tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("a {budget} b c d e", encoding="utf-8")
    for chat in (True, False):
        config = TaskConfig(source=f"corpus:{tmp_path / 't.txt'}", params={"min_words": 2, "budget": 800}, heldout=1)
        task = load_task(config.model_copy(update={"chat": chat}))
        found = [shown(task.train[0], x) for x in (0.0, 0.5, 1.0)]
        assert [item.metadata["budget"] for item in found] == [800, 357, 160]
        for item, budget in zip(found, (800, 357, 160), strict=True):
            assert f"in about {budget} tokens" in item.text
            assert "a {budget}" in item.text  # the text's own
    plain = Item(prompt="{budget}", metadata={"budget": 3})
    assert shown(plain, 0.5) is plain


def items_of(**counts: int) -> Task:
    items = [Item(prompt=f"{tier}{i}", metadata={"tier": tier}) for tier, n in counts.items() for i in range(n)]
    return Task("made", items, [], None, (tuple(items),), "")


def test_prompts_follow_the_law_of_the_tiers() -> None:
    tiers = TierConfig.model_validate(TIERS)
    prompts = PromptStream(items_of(easy=50, hard=50), 0, tiers)
    shares = {}
    for progress in (0.0, 0.2, 0.5, 0.9):
        drawn = [i.metadata["tier"] for _ in range(40) for i in prompts.draw(25, progress)]
        shares[progress] = drawn.count("hard") / 1000
    assert shares[0.0] == shares[0.2] == 0
    # Halfway 0.375, at the end 0.75; five standard deviations of a share of 1000 draws are at most 0.08.
    assert shares[0.5] == pytest.approx(0.375, abs=0.08)
    assert shares[0.9] == pytest.approx(0.75, abs=0.08)


def test_a_tier_is_drawn_without_repetition_while_it_lasts() -> None:
    prompts = PromptStream(items_of(easy=6, hard=1), 0, TierConfig.model_validate(TIERS))
    seen = set()
    for _ in range(20):
        drawn = [item.prompt for item in prompts.draw(6, 0.0)]
        assert len(set(drawn)) == 6
        seen.add(tuple(drawn))
    assert len(seen) > 1
    assert len(prompts.draw(9, 0.0)) == 9


def test_a_tiered_stream_continues_from_its_position() -> None:
    task, tiers = items_of(easy=9, hard=9), TierConfig.model_validate(TIERS)
    whole, cut = PromptStream(task, 3, tiers), PromptStream(task, 3, tiers)
    for progress in (0.0, 0.4):
        assert whole.draw(5, progress) == cut.draw(5, progress)
    resumed = PromptStream(task, 3, tiers)
    resumed.restore(cut.position)
    for progress in (0.5, 0.6, 1.0):
        assert whole.draw(5, progress) == resumed.draw(5, progress)


def test_a_tier_without_items_is_refused() -> None:
    with pytest.raises(ValueError, match=r"of tier \['hard'\]; tiers that are there: \['easy'\]"):
        PromptStream(items_of(easy=3), 0, TierConfig.model_validate(TIERS))


# -- recipes


def test_a_text_and_terms_over_it_belong_together(tiny: Tiny, tmp_path: Path) -> None:
    data = reading(tiny, tmp_path)
    with pytest.raises(RecipeError, match=r"\('rmt/next-token'\), but the recipe names no text .* corpus\.path"):
        build_recipe({k: v for k, v in data.items() if k != "corpus"})
    with pytest.raises(RecipeError, match="no terms over one; drop it with corpus=null"):
        build_recipe(data | {"algorithm": {"preset": "rmt", "ntp_coef": 0.0}})
    build_recipe(data | {"algorithm": {"preset": "rmt", "ntp_coef": 0.0}, "corpus": None})


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("none.txt", None, "corpus.path: .*none.txt"),
        ("empty.txt", "\n \n", "corpus.path: .*empty.txt holds no text"),
        ("a.jsonl", '{"text": "a"}\n{"txt": "b"}', r"a.jsonl, line 2: expected an object such as"),
        ("a.jsonl", "{", r"a.jsonl, line 1: not JSON"),
        ("a.csv", "a,b", r"a text is a `.txt` file or a `.jsonl` file"),
    ],
)
def test_a_text_that_cannot_be_read_is_named(
    tiny: Tiny, tmp_path: Path, name: str, content: str | None, says: str
) -> None:
    if content is not None:
        (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(RecipeError, match=says):
        build_recipe(reading(tiny, tmp_path, corpus={"path": str(tmp_path / name)}))


@pytest.mark.parametrize(
    ("task", "says"),
    [
        ({"params": {"budgt": 3}}, "did you mean 'budget'"),
        ({"params": {"min_words": 0}}, "min_words = 0: must be a whole number above zero"),
        ({"params": {"budget": 4, "decay": 2}}, "a budget needs"),
        ({"params": {"decay": 0.5}}, "give it a budget"),
        ({"params": {"budget": 4, "instruction": "Go on: "}}, "give both or neither"),
        ({"params": {"instruction": 4}}, "instruction = 4: must be text"),
        ({"source": "corpus:harbour.txt"}, "did you mean 'harbor.txt'"),
        ({"source": "corpus:"}, "names no data set"),
        ({"tiers": TIERS | {"end": 0.1}}, "0 <= begin < end <= 1"),
        ({"tiers": TIERS | {"last": {"easy": 1.0}}}, "a share for every tier"),
        ({"tiers": TIERS | {"last": {"easy": 0.5, "hard": 0.6}}}, "sum to 1"),
    ],
)
def test_impossible_tasks_are_refused(tiny: Tiny, tmp_path: Path, task: dict[str, Any], says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        build_recipe(reading(tiny, tmp_path, task={"params": {"budget": 4}} | task))


def test_the_shipped_recipe_finds_its_texts() -> None:
    recipe = load_recipe("rmt")
    task = load_task(recipe.task)
    assert len(task.train) > 500
    assert len(task.heldout) > 100
    counts = [sum(item.metadata["tier"] == tier for item in task.train) for tier in ("easy", "medium", "hard")]
    assert min(counts) > 0.2 * len(task.train)


# -- the step


def bare(recipe: Recipe, run: Path, count: int) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    """Trainable weights after `count` bare steps, and the lines of metrics."""
    with Session(recipe, run, []) as session:
        for step in range(count):
            session.trainer.step(step)
        return {n: p.detach().clone() for n, p in session.trainer.policy.trainable_parameters()}, lines(run)


def test_two_steps_learn_from_both(tiny: Tiny, tmp_path: Path) -> None:
    recipe = build_recipe(reading(tiny, tmp_path))
    both, record = bare(recipe, tmp_path / "both", 2)
    only = build_recipe(reading(tiny, tmp_path, algorithm={"ntp_coef": 0.0}, corpus=None))
    alone, without = bare(only, tmp_path / "alone", 2)
    assert not all(torch.equal(both[name], alone[name]) for name in both)
    for line in record:
        assert 0 < line["corpus/rmt/next-token/mean"] < 2 * math.log(12)
        assert "skipped_updates" not in line
    assert not any("corpus" in key for line in without for key in line)
    # The sampled responses are the same in the first step: only the loss differs, by 0.1 times the mean.
    expected = without[0]["loss"] + 0.1 * record[0]["corpus/rmt/next-token/mean"]
    assert record[0]["loss"] == pytest.approx(expected, rel=1e-4)


def test_the_gradient_is_that_of_the_mean_nll(tiny: Tiny, tmp_path: Path) -> None:
    recipe = build_recipe(reading(tiny, tmp_path, algorithm={"ntp_coef": 0.7}, train={"micro_batch_tokens": 12}))
    with Session(recipe, tmp_path / "run", []) as session:
        trainer = session.trainer
        assert trainer.corpus is not None
        text = trainer.corpus.draw(0, session.trainer.task.train[:6])
        text = text.replace(mask=text.mask & (torch.arange(len(text)) != 1)[:, None])  # a row with nothing to predict
        assert 0 < int(text.mask.sum()) < int(text.lengths.sum())
        from tokenloom.plan import Metrics

        metrics = Metrics()
        assert trainer._read(text, 0, metrics)
        found = {n: p.grad.clone() for n, p in trainer.policy.trainable_parameters() if p.grad is not None}
        trainer.optimizer.clear()
        nll = mean_nll(trainer.policy.causal, text)
        (0.7 * nll).backward()
        parameters = trainer.policy.trainable_parameters()
        # Sums of 3 rows x 8 tokens in another order; gradients are of order 1.
        tolerance = 24 * 16 * torch.finfo(torch.float32).eps
        assert found.keys() == {n for n, p in parameters if p.grad is not None}
        for name, parameter in parameters:
            torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=tolerance)
    assert metrics.result()["loss"] == pytest.approx(0.7 * float(nll.detach()), rel=1e-5)


def mean_nll(model: Any, text: Rollouts) -> torch.Tensor:
    """With the model's own logits, row by row."""
    losses = []
    for i in range(len(text)):
        n = int(text.lengths[i])
        ids = torch.cat([text.prompt_tokens[i], text.response(i)])[None]
        law = model(ids).logits[0, :-1].log_softmax(-1)
        losses.append(-law.gather(1, ids[0, 1:, None])[:, 0][text.mask[i, :n]])
    return torch.cat(losses).mean()


def test_micro_batches_do_not_change_the_step(tiny: Tiny, tmp_path: Path) -> None:
    def recipe(tokens: int) -> Recipe:
        training = {"learning_rate": 0.05, "adam_eps": 1.0, "micro_batch_tokens": tokens, "eval": EVAL}
        return build_recipe(reading(tiny, tmp_path, train=training))

    whole, _ = bare(recipe(10_000), tmp_path / "whole", 2)
    split, _ = bare(recipe(1), tmp_path / "split", 2)
    # As in test_loop.py, with 24 tokens of text beside the 36 of the responses.
    tolerance = 2 * 0.05 * 60 * torch.finfo(torch.float32).eps
    for name, value in whole.items():
        torch.testing.assert_close(split[name], value, rtol=0, atol=tolerance)


def test_text_that_gives_no_number_skips_the_update(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tokenloom.algorithm import Algorithm

    recipe = build_recipe(reading(tiny, tmp_path))
    plain = Algorithm.corpus_loss

    def broken(*args: Any, **rest: Any) -> Any:
        loss, metrics = plain(*args, **rest)
        return loss * math.nan, metrics

    monkeypatch.setattr(Algorithm, "corpus_loss", broken)
    with Session(recipe, tmp_path / "run", []) as session:
        before = {n: p.detach().clone() for n, p in session.trainer.policy.trainable_parameters()}
        session.trainer.step(0)
        after = dict(session.trainer.policy.trainable_parameters())
        assert all(torch.equal(value, after[n]) for n, value in before.items())
    (line,) = steps(tmp_path / "run")
    assert line["skipped_updates"] == 1
    (folder,) = (tmp_path / "run" / "bad").iterdir()
    assert len(Rollouts.load(folder / "corpus")) == 3


def test_a_run_goes_on_after_a_kill_as_if_nothing_had_happened(tiny: Tiny, tmp_path: Path) -> None:
    class Killed(BaseException):
        pass

    recipe = build_recipe(reading(tiny, tmp_path, train={"steps": 4}))
    train(recipe, tmp_path / "whole")
    for moment in (1, 3):
        with Session(recipe, tmp_path / "cut", [], resume=moment > 1) as session:
            trainer = session.trainer
            original = trainer.optimizer.step

            def step(number: int, moment: int = moment, original: Any = original) -> Any:
                if number == moment:
                    raise Killed
                return original(number)

            trainer.optimizer.step = step  # type: ignore[method-assign]
            with pytest.raises(Killed):
                trainer.train()
    train(recipe, tmp_path / "cut", resume=True)
    same_results(tmp_path / "whole", tmp_path / "cut")
