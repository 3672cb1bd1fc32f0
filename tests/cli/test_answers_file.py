"""`generate --out`: what has been written stays, an interrupted call goes on, and nothing else is touched."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest

from cli.calling import call
from cli.tiny_run import make_tiny_model
from tokenloom.cli import answering
from tokenloom.cli.answers_file import AnswersFile
from tokenloom.report.samplers import write_samplers

WAYS = [[], ["--sampler", "top-h:alpha=0.9"]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("answers"))


@pytest.fixture
def asked(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """A call with four prompts, two of them the same, answered one prompt at a time."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(answering, "_ROWS", 16)
    Path("p.txt").write_text("1+1\n2+2\n1+1\n3\n", encoding="utf-8")
    return ["generate", model, "--prompts", "p.txt", "-n", 16, "--max-tokens", 6, "--seed", 5, "--out", "out.jsonl"]


def stop_at(monkeypatch: pytest.MonkeyPatch, begin: int, error: type[BaseException] = KeyboardInterrupt) -> None:
    """Interrupt the call when it comes to the prompt `begin`."""
    for kind in (answering.Sampled, answering.Decoded):
        ordinary = kind.lines

        def lines(self: Any, at: int, *rest: Any, ordinary: Any = ordinary) -> Any:
            if at == begin:
                raise error
            return ordinary(self, at, *rest)

        monkeypatch.setattr(kind, "lines", lines)


@pytest.mark.parametrize("way", WAYS)
def test_an_interrupted_call_goes_on_to_the_same_end(asked: list[object], way: list[str]) -> None:
    assert call(*asked, *way).exit_code == 0
    whole = Path("out.jsonl").read_text(encoding="utf-8")
    assert whole.count("\n") == 64
    assert not list(Path().glob("*.part*"))
    with pytest.MonkeyPatch.context() as patched:
        stop_at(patched, 2)
        result = call(*asked, *way)
    assert result.exit_code == 130
    assert "the same command goes on from the 32 responses in" in result.stderr
    assert Path("out.jsonl").read_text(encoding="utf-8") == whole, "the old file stays until the new one is whole"
    part = Path("out.jsonl.part")
    assert part.read_text(encoding="utf-8").count("\n") == 33
    # As if killed while it wrote: some lines of the third prompt, the last of them torn.
    ahead = whole.splitlines(keepends=True)[32:34]
    with part.open("a", encoding="utf-8") as file:
        file.write(ahead[0] + ahead[1][:20])
    again = call(*asked, *way)
    assert again.exit_code == 0, again.output
    assert "32 of 64 responses were there already" in again.stderr
    assert Path("out.jsonl").read_text(encoding="utf-8") == whole
    assert not part.exists()


def test_a_seed_that_was_drawn_is_taken_up(asked: list[object], monkeypatch: pytest.MonkeyPatch) -> None:
    place = asked.index("--seed")
    unseeded = [*asked[:place], *asked[place + 2 :]]
    with pytest.MonkeyPatch.context() as patched:
        stop_at(patched, 1)
        assert call(*unseeded).exit_code == 130
    drawn = json.loads(Path("out.jsonl.part").read_text(encoding="utf-8").splitlines()[0])["settings"]["seed"]
    assert call(*unseeded).exit_code == 0
    found = Path("out.jsonl").read_text(encoding="utf-8")
    assert call(*unseeded, "--seed", drawn).exit_code == 0
    assert Path("out.jsonl").read_text(encoding="utf-8") == found


def test_another_call_does_not_go_on_from_it(asked: list[object]) -> None:
    with pytest.MonkeyPatch.context() as patched:
        stop_at(patched, 3, RuntimeError)
        assert call(*asked).exit_code == 1
    before = Path("out.jsonl.part").read_bytes()
    Path("p.txt").write_text("1+1\n2+2\n1+1\n0\n", encoding="utf-8")
    result = call(*asked, "--temperature", 0.5)
    assert result.exit_code == 2
    assert "holds 48 responses of an interrupted call with other settings (prompts, --temperature)" in result.stderr
    assert Path("out.jsonl.part").read_bytes() == before


def test_a_call_that_wrote_nothing_leaves_nothing(asked: list[object]) -> None:
    with pytest.MonkeyPatch.context() as patched:
        stop_at(patched, 0)
        result = call(*asked)
    assert (result.exit_code, result.stderr) == (130, "stopped\n")
    assert [p.name for p in Path().iterdir()] == ["p.txt"]


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("p.txt", "p.txt is read by this call"),
        (".", ". is a folder"),
        ("no/out.jsonl", "there is no folder no"),
    ],
)
def test_places_that_cannot_be_are_refused(asked: list[object], out: str, message: str) -> None:
    before = Path("p.txt").read_bytes()
    result = call(*asked[:-1], out)
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert Path("p.txt").read_bytes() == before


def test_a_file_of_someone_else_is_not_taken(asked: list[object]) -> None:
    Path("out.jsonl.part").write_text("notes\n", encoding="utf-8")
    result = call(*asked)
    assert result.exit_code == 2
    assert "is in the way" in result.stderr
    assert Path("out.jsonl.part").read_text(encoding="utf-8") == "notes\n"


def test_what_a_link_leads_to_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "real.jsonl").write_text("old\n", encoding="utf-8")
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "real.jsonl")
    file = AnswersFile(tmp_path / "link.jsonl", {}, 1)
    file.add([{"response": "é"}])
    file.finish()
    assert (tmp_path / "link.jsonl").is_symlink()
    assert (tmp_path / "real.jsonl").read_text(encoding="utf-8") == '{"response": "é"}\n'


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_pipes_stay_pipes(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)

    def page() -> None:
        write_samplers(pipe, "a model", [], [], lambda ids: "")

    def answers() -> None:
        file = AnswersFile(pipe, {}, 1)
        file.add([{"response": "1"}])
        file.leave()
        file.finish()

    for write, start in ((page, "<!doctype html>"), (answers, '{"response": "1"}')):
        writer = threading.Thread(target=write)
        writer.start()
        assert pipe.read_text(encoding="utf-8").startswith(start)
        writer.join()
        assert pipe.is_fifo()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_says_where(asked: list[object]) -> None:
    result = call(*asked[:-1], "/dev/full")
    assert result.exit_code == 1
    assert "No space left on device: /dev/full" in result.stderr
