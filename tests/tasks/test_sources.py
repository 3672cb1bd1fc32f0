"""Items from generated data, files and Hugging Face data sets, through `load_task`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tokenloom.tasks import Item, SourceConfig, TaskConfig, Verifier, load_task
from tokenloom.tasks.sources import gym, jsonl
from tokenloom.tasks.sources.encoding import decode, encode

ONE_DIGIT = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}


def written(path: Path, *lines: object) -> str:
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    path.write_text(text, encoding="utf-8")
    return str(path)


def keys(items: Any) -> list[str]:
    return [item.key for item in items]


def test_the_quickstart_has_two_hundred_problems_in_equal_halves() -> None:
    splits = []
    for seed in (0, 1, 12345):
        config = TaskConfig(source="reasoning_gym:chain_sum", params=ONE_DIGIT, heldout=0.5, seed=seed)
        task = load_task(config)
        assert (len(task.train), len(task.heldout)) == (100, 100)
        assert not set(keys(task.train)) & set(keys(task.heldout))
        splits.append((keys(task.train), keys(task.heldout)))
        assert "100 training and 100 held-out" in task.report
        assert "only 200 distinct problems" in task.report
    # Every seed draws the same universe, and the split is by content: the halves cannot differ.
    assert splits[0] == splits[1] == splits[2]


def test_wording_never_moves_a_problem_across() -> None:
    base = TaskConfig(source="reasoning_gym:chain_sum", params=ONE_DIGIT, heldout=0.5)
    plain = load_task(base)
    worded = load_task(base.model_copy(update={"prompt_suffix": "Just the number.", "system": "Be brief."}))
    assert [item.metadata for item in plain.train] == [item.metadata for item in worded.train]
    first = worded.train[0]
    assert first.messages is not None
    assert [message["role"] for message in first.messages] == ["system", "user"]
    assert first.messages[1]["content"] == f"{plain.train[0].text} Just the number."


def test_consecutive_seeds_overlap_and_are_deduplicated() -> None:
    zero, _ = gym.draw("chain_sum", {}, seed=0, size=50)
    one, _ = gym.draw("chain_sum", {}, seed=1, size=50)
    assert keys(zero)[1:] == keys(one)[:-1]  # why no split may be by seed
    assert len(set(keys(zero))) == 50


def test_finite_data_sets_are_drawn_past_their_own_end() -> None:
    items, note = gym.draw("list_functions", {}, seed=0, size=120)
    assert (len(set(keys(items))), note) == (120, "")


def test_entries_survive_json_exactly() -> None:
    entry = {"a": (1, [2.5, None]), "b": {1: "x", (2, 3): True}, "~": {"~": "tuple"}, "s": {1, 2}}
    assert decode(json.loads(json.dumps(encode(entry)))) == entry
    assert isinstance(decode(encode(entry))["a"], tuple)
    with pytest.raises(ValueError, match="type object cannot be kept"):
        encode(object())


def test_params_are_converted_to_the_declared_types() -> None:
    params = {"datasets": [{"name": "chain_sum", "weight": 1.0, "config": ONE_DIGIT}]}
    items, _ = gym.draw("composite", params, seed=0, size=5)
    assert len(items) == 5
    items, _ = gym.draw("calendar_arithmetic", {"tasks": ["weekday_of_date"]}, seed=0, size=3)
    assert len(items) == 3


def test_files(tmp_path: Path) -> None:
    path = written(
        tmp_path / "mine.jsonl",
        "\ufeff" + json.dumps({"prompt": "2+2\u2028=", "answer": "4", "level": 1}),
        "",
        "   ",
        {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "3+3"}], "answer": 6},
        {"prompt": "2+2\u2028=", "answer": "4"},
        {"prompt": "5", "answer": "x\ny"},
    )
    task = load_task(TaskConfig(source=path, heldout=1, prompt_suffix="\n!"))
    items = sorted([*task.train, *task.heldout], key=lambda item: item.text)
    assert [item.text for item in items] == ["2+2\u2028=\n!", "5\n!", "system: s\nuser: 3+3\n!"]
    assert items[0].metadata == {"level": 1}
    assert "1 of 4 items repeated" in task.report
    with Verifier(TaskConfig(source=path)) as verifier:
        assert verifier.score(items, ["4", "x\ny", "7"]).rewards == [1.0, 1.0, 0.0]


def test_the_order_of_a_file_changes_nothing(tmp_path: Path) -> None:
    records = [{"prompt": f"problem {n}", "answer": n} for n in range(30)]
    forward = load_task(TaskConfig(source=written(tmp_path / "a.jsonl", *records), size=20))
    backward = load_task(TaskConfig(source=written(tmp_path / "b.jsonl", *records[::-1]), size=20, seed=9))
    assert forward.train == backward.train
    assert forward.heldout == backward.heldout
    assert len(forward.train) + len(forward.heldout) == 20


def test_plain_prompts_can_stay_plain(tmp_path: Path) -> None:
    path = written(tmp_path / "mine.jsonl", {"q": "a", "a": 1}, {"q": "b", "a": 2})
    task = load_task(TaskConfig(source=path, chat=False, prompt_suffix="=", fields={"prompt": "q", "answer": "a"}))
    assert {item.prompt for item in (*task.train, *task.heldout)} == {"a =", "b ="}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: not JSON: .* at column"),
        ("[1]", "line 2: expected an object .* got list"),
        ('{"answer": 1}', r"line 2: needs 'prompt' or 'messages'; it has \['answer'\]"),
        ('{"prompt": "a", "messages": [], "answer": 1}', "line 2: has both"),
        ('{"prompt": "a", "anwser": 1}', "line 2: unknown column 'answer'; did you mean 'anwser'"),
        ('{"prompt": 3, "answer": 1}', "line 2: 'prompt' must be text that is not blank, got 3"),
        ('{"prompt": "  ", "answer": 1}', "line 2: 'prompt' must be text"),
        ('{"messages": [], "answer": 1}', "line 2: `messages` must be a non-empty list"),
        ('{"messages": [{"role": "user"}], "answer": 1}', "line 2: `content` of message 1 of 1 is missing"),
        ("[" * 100_000, "line 2: (nested too deeply|not JSON)"),
    ],
)
def test_malformed_lines_are_named(tmp_path: Path, line: str, message: str) -> None:
    path = written(tmp_path / "mine.jsonl", {"prompt": "fine", "answer": 1}, line)
    with pytest.raises(ValueError, match=message) as caught:
        jsonl.read(path, {})
    assert str(caught.value).startswith(path)


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_bytes(b'{"prompt": "\xff", "answer": 1}')
    with pytest.raises(ValueError, match="is not UTF-8"):
        jsonl.read(str(tmp_path / "bad.jsonl"), {})
    with pytest.raises(ValueError, match="holds no items"):
        jsonl.read(written(tmp_path / "empty.jsonl", "", ""), {})
    with pytest.raises(ValueError, match=r"did you mean .*bad\.jsonl"):
        jsonl.read(str(tmp_path / "bads.jsonl"), {})
    one = written(tmp_path / "one.jsonl", {"prompt": "a", "answer": 1}, {"prompt": "a", "answer": 1})
    with pytest.raises(ValueError, match="at least 2 distinct problems"):
        load_task(TaskConfig(source=one))


def test_a_held_out_file_of_its_own(tmp_path: Path) -> None:
    train = written(tmp_path / "train.jsonl", *({"prompt": str(n), "answer": n} for n in range(5)))
    test = written(tmp_path / "test.jsonl", *({"prompt": str(n), "answer": n} for n in range(4, 8)))
    task = load_task(TaskConfig(source=train, heldout=SourceConfig(source=test)))
    assert {item.text for item in task.train} == {"0", "1", "2", "3"}
    assert {item.text for item in task.heldout} == {"4", "5", "6", "7"}
    assert "1 training items also appear in the held-out source" in task.report


def test_sources_mix_by_weight_and_open_in_order() -> None:
    easy = SourceConfig(source="reasoning_gym:chain_sum", params={"max_terms": 2}, weight=3)
    hard = SourceConfig(source="reasoning_gym:chain_sum", params={"min_terms": 4}, weight=1)
    task = load_task(TaskConfig(sources=[easy, hard], size=80, heldout=20, curriculum=True))
    assert (len(task.train), len(task.heldout), len(task.stages)) == (60, 20, 2)
    terms = [item.metadata["entry"]["metadata"]["num_terms"] for item in task.train]
    assert all(n == 2 for n in terms[: len(task.stages[0])])
    assert all(n >= 4 for n in terms[len(task.stages[0]) :])
    assert task.stage(0.0) == task.stage(0.49) == list(task.stages[0])
    assert task.stage(0.5) == task.stage(1.0) == list(task.train)
    flat = load_task(TaskConfig(sources=[easy, hard], size=80, heldout=20))
    assert flat.stage(0.0) == list(flat.train)
    assert flat.heldout == task.heldout


def test_hugging_face_data_sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "set").mkdir()
    written(
        tmp_path / "set" / "train.jsonl",
        *({"question": f"q{n}", "answer": f"#### {n}", "x": n} for n in range(6)),
    )
    source = f"hf:{tmp_path / 'set'}"
    config = TaskConfig.model_validate({"source": source, "heldout": 2, "rewards": [{"verifier": "number"}]})
    task = load_task(config)
    assert (len(task.train), len(task.heldout)) == (4, 2)
    item = task.train[0]
    with Verifier(config) as verifier:
        assert verifier.score([item], [f"it is {item.metadata['x']}"]).rewards == [1.0]
    with pytest.raises(ValueError, match="unknown column 'questions'; did you mean 'question'"):
        load_task(TaskConfig(source=source, fields={"prompt": "questions"}))
    with pytest.raises(ValueError, match=r"split 'tests'\) cannot be loaded"):
        load_task(TaskConfig(source=source, split="tests"))


def test_generated_items_are_scored_by_their_own_data_set() -> None:
    config = TaskConfig(source="reasoning_gym:countdown", size=4, heldout=1)
    task = load_task(config)
    items: list[Item] = [*task.train, *task.train[:1]]
    with Verifier(config) as verifier:
        answers = [str(item.answer) for item in task.train]
        scores = verifier.score(items, [f"<answer>{answers[0]}</answer>", *answers[1:], "nonsense"])
    assert scores.correct == [True, True, True, False]
    assert scores.rewards[:3] == [1.0, 1.0, 1.0]
    assert scores.rewards[3] < 0.5
    assert (scores.errors, scores.timeouts) == (0, 0)
