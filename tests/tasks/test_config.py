"""The `task:` section refuses mistakes by name before anything is generated."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import ValidationError

from tokenloom.tasks import RewardConfig, TaskConfig, check_task

SUM = {"source": "reasoning_gym:chain_sum"}


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({}, "exactly one of `source` and `sources`"),
        ({**SUM, "sources": [SUM]}, "exactly one of `source` and `sources`"),
        ({**SUM, "sorce": 1}, "Extra inputs"),
        ({"source": "reasoning-gym:chain_sum"}, "did you mean 'reasoning_gym'"),
        ({"source": "reasoning_gym:"}, "names no data set"),
        ({"source": "data.json"}, "One JSON object a line"),
        ({"source": "data.csv"}, "is not understood"),
        ({**SUM, "heldout": 1.0}, "strictly between 0 and 1, got 1.0"),
        ({**SUM, "heldout": 0}, "at least one problem must be held out"),
        ({**SUM, "heldout": True}, "expected a fraction, a count or a source"),
        ({**SUM, "size": 1}, "greater than or equal to 2"),
        ({**SUM, "timeout": 0}, "greater than 0"),
        ({**SUM, "workers": 0}, "greater than or equal to 1"),
        ({**SUM, "rewards": [{"verifier": "exakt"}]}, "did you mean 'exact'"),
        ({**SUM, "rewards": [{"verifier": "exact", "weight": float("nan")}]}, "finite number"),
        ({**SUM, "curriculum": True}, "at least two entries"),
        ({"sources": [SUM], "params": {"min_terms": 1}}, "belong inside each entry"),
        ({**SUM, "chat": False, "system": "Be brief."}, "`system` needs chat: true"),
        ({**SUM, "environment": "calculater"}, "did you mean 'calculator'"),
        ({**SUM, "environment_params": {"max_calls": 1}}, "needs `environment`"),
        ({**SUM, "fields": {"question": "q"}}, "unknown field 'question'"),
        ({**SUM, "fields": {"prompt": "q", "messages": "m"}}, "not both"),
    ],
)
def test_mistakes_are_named(section: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        TaskConfig.model_validate(section)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (
            {"source": "reasoning_gym:chain_sums"},
            "unknown reasoning-gym data set 'chain_sums'; did you mean 'chain_sum'",
        ),
        (
            {**SUM, "params": {"min_term": 2}},
            "parameter of reasoning_gym:chain_sum 'min_term'; did you mean 'min_terms'",
        ),
        ({**SUM, "params": {"seed": 2}}, "is set by `task.seed`"),
        ({**SUM, "params": {"size": 2}}, "is set by `task.size`"),
        (
            {**SUM, "params": {"min_terms": "two"}},
            "'min_terms' of reasoning_gym:chain_sum: .*integer.* got 'two'",
        ),
        ({**SUM, "params": {"min_terms": 9}}, "max_terms must be >= min_terms"),
        ({"source": "no/such/file.jsonl"}, "unknown file 'no/such/file.jsonl'"),
        ({"source": "hf:x", "params": {"nam": "main"}}, "did you mean 'name'"),
        ({"source": "hf:x", "params": {"trust_remote_code": True}}, "unknown parameter of hf:x"),
        ({**SUM, "heldout": {"source": "no.jsonl"}}, "unknown file 'no.jsonl'"),
    ],
)
def test_mistakes_that_need_the_source_are_named(section: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_task(TaskConfig.model_validate(section))


def test_default_rewards_follow_the_source() -> None:
    assert TaskConfig.model_validate(SUM).all_rewards == [RewardConfig(verifier="reasoning_gym")]
    assert TaskConfig(source="mine.jsonl").all_rewards == [RewardConfig(verifier="exact")]
    own = [RewardConfig(verifier="number", weight=2)]
    assert TaskConfig(source="mine.jsonl", rewards=own).all_rewards == own


def test_the_section_survives_json_and_has_a_schema() -> None:
    config = TaskConfig.model_validate({**SUM, "heldout": 0.5, "rewards": [{"verifier": "number"}]})
    assert TaskConfig.model_validate_json(config.model_dump_json()) == config
    assert json.dumps(TaskConfig.model_json_schema())
    assert TaskConfig(source="hf:x", heldout=3).heldout == 3
