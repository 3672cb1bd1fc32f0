"""MkDocs hook: one page per method, written from the catalog while the site is built (nothing is checked in).

mkdocs.yml names this file under `hooks`. A page repeats what the method's file says about itself, the
composition its preset stands for, every hyperparameter with its default, and what the preset does to
each token of one small batch, computed here and now.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from typing import Any

import torch

from tokenloom import catalog
from tokenloom.algorithm import Algorithm
from tokenloom.batch import Rollouts
from tokenloom.catalog import DECODING_STAGES, Method, Part, parts
from tokenloom.decode.registry import KINDS, decoders
from tokenloom.parameters import Hyperparameter, describe_type
from tokenloom.signals import Signals, signal_example, signal_names
from tokenloom.vocabulary import VOCABULARY


def on_config(config: Any) -> Any:
    """Append the generated pages to the navigation."""
    families: dict[str, list[Any]] = {}
    for method in catalog.methods().values():
        families.setdefault(method.family, []).append({method.slug: page_path(method)})
    section: list[Any] = ["methods/index.md"]
    section += [{family.replace("-", " ").capitalize(): pages} for family, pages in sorted(families.items())]
    config["nav"].append({"Methods": section})
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the generated pages to the site's files."""
    from mkdocs.structure.files import File

    table = catalog.methods().values()
    files.append(File.generated(config, "methods/index.md", content=index_page(table)))
    for method in table:
        files.append(File.generated(config, page_path(method), content=method_page(method)))
    return files


def page_path(method: Method) -> str:
    """Where the page of a method lies under docs/."""
    return f"methods/{method.family}/{method.slug}.md"


def index_page(methods: Any) -> str:
    """The table of all methods."""
    rows = [
        f"| [{m.slug}]({page_path(m).removeprefix('methods/')}) | {', '.join(m.stages)} "
        f"| {headline(m)} | {paper(m.paper)} |"
        for m in methods
    ]
    head = ["| method | stages | what it does | paper |", "| --- | --- | --- | --- |"]
    return "\n".join(
        ["# Methods", "", "Written from the catalog, as `tokenloom methods` prints it.", "", *head, *rows, ""]
    )


def method_page(method: Method) -> str:
    """The page of one method, Markdown."""
    lines = [f"# {method.slug}", "", f"{headline(method)}", ""]
    lines += [f"Family {method.family} · stages: {', '.join(method.stages)} · {paper(method.paper)}", ""]
    rest = method.document.split("\n", 1)
    if len(rest) > 1 and rest[1].strip():
        lines += ["```text", rest[1].strip("\n"), "```", ""]
    if method.preset is not None:
        lines += list(_preset_section(method))
    lines += list(_decoder_section(method))
    for part in sorted(method.parts, key=lambda p: (p.stage, p.name)):
        lines += list(_part_section(part))
    return "\n".join(lines)


def headline(method: Method) -> str:
    """What the method does, the first line of its file's docstring, safe inside a table."""
    first = method.document.split("\n", 1)[0] or (method.parts[0].summary if method.parts else "")
    return first.replace("|", "\\|")


def paper(reference: str) -> str:
    """A citation, linked when it is an arXiv identifier."""
    found = re.fullmatch(r"arXiv:(\d{4}\.\d{4,5})", reference)
    return f"[{reference}](https://arxiv.org/abs/{found[1]})" if found else reference


def _preset_section(method: Method) -> Iterator[str]:
    assert method.preset is not None
    algorithm = Algorithm.from_recipe(method.slug)
    yield from [
        "## The preset",
        "",
        "```bash",
        f"tokenloom train quickstart algorithm={method.slug}",
        "```",
        "",
    ]
    yield from ["It is made of:", "", "```text", *algorithm.describe(), "```", ""]
    if method.preset.dialects:
        named = ", ".join(f"`{d}`" for d in method.preset.dialects)
        yield from [f"Dialects, for what each framework means by the name: {named}.", ""]
    if method.preset.parameters:
        yield from _parameter_table(method.preset.parameters)
    yield from _coefficient_section(algorithm)


def _decoder_section(method: Method) -> Iterator[str]:
    """How a decoding method is called: what `tokenloom.decode` builds under its name."""
    for kind in KINDS:
        found = decoders(kind).get(method.slug)
        if found is None:
            continue
        objects = "".join(f", {name}=..." for name, required in found.inputs.items() if required)
        call = {
            "shaper": f'model.generate(**inputs, logits_processor=[decode.shaper("{found.slug}"{objects})])',
            "loop": f'model.generate(**inputs, custom_generate=decode.loop("{found.slug}"{objects}))',
        }.get(kind, f'decode.build("{kind}", "{found.slug}")')
        yield from [f"## As a {kind}", "", "```python", "from tokenloom import decode", "", call, "```", ""]
        if kind in ("shaper", "loop") and not set(objects.replace("=...", "").split(", ")) - {"", "model", "tokenizer"}:
            command = f'tokenloom generate smollm2-135m-instruct "Tell me about rivers." --sampler {found.slug}'
            yield from ["```bash", command, "```", ""]
        yield from ["```text", inspect.getdoc(found.build) or "", "```", ""]
        if found.parameters:
            yield from _parameter_table(found.parameters)


def _part_section(part: Part) -> Iterator[str]:
    yield from [f"## Part `{part.name}`", ""]
    yield from [f"Stage **{part.stage}**, scope **{part.scope}**, paper: {paper(part.paper)}", ""]
    yield from ["```text", inspect.getdoc(part.function) or "", "```", ""]
    if part.stage in DECODING_STAGES:
        yield from ["```python", f"{part.function.__name__}{inspect.signature(part.function)}", "```", ""]
        if part.hyperparameters:
            yield from _parameter_table(part.hyperparameters)
        return
    yield from ["| it reads | which is |", "| --- | --- |"]
    for name, required in part.inputs.items():
        meaning = VOCABULARY.get(name) or f"signal `{name}`"
        yield f"| `{name}`{'' if required else ' (if present)'} | {meaning} |"
    yield ""
    if part.hyperparameters:
        yield from _parameter_table(part.hyperparameters)


def _parameter_table(parameters: dict[str, Hyperparameter]) -> Iterator[str]:
    yield from ["| parameter | default | takes |", "| --- | --- | --- |"]
    for name, held in parameters.items():
        default = "null" if held.default is None else held.default
        yield f"| `{name}` | {default} | {describe_type(held.annotation).replace('|', ' or ')} |"
    yield ""


def _coefficient_section(algorithm: Algorithm) -> Iterator[str]:
    """What the preset does to each token of a group of four answers, one of them right."""
    rollouts, signals = example_batch()
    missing = (algorithm.needs | algorithm.loss_needs) & set(signal_names())
    if missing:
        return
    value = algorithm.coefficients(rollouts, signals)["logprobs"]
    yield from ["## What it does to each token", ""]
    yield "Coefficients `−∂loss/∂logprobs` for one prompt with four answers of three tokens, the first"
    yield "of them right. The policy has moved since sampling: the ratios of each answer's tokens are 0.7, 1 and 1.4."
    yield from ["", "| answer | reward | token 1 (ratio 0.7) | token 2 (ratio 1) | token 3 (ratio 1.4) |"]
    yield "| --- | --- | --- | --- | --- |"
    assert rollouts.rewards is not None
    for row in range(len(rollouts.tokens)):
        cells = " | ".join(f"{v:+.4f}" if v else "0" for v in value[row].tolist())
        yield f"| {row + 1} | {rollouts.rewards[row]:g} | {cells} |"
    yield ""


def example_batch() -> tuple[Rollouts, Signals]:
    """One prompt, four answers of three tokens, rewards 1, 0, 0, 0, and every ordinary signal, float64."""
    parts()  # registers the signals that methods declare
    rewards = torch.tensor([1.0, 0.0, 0.0, 0.0], dtype=torch.float64)
    old = torch.tensor([-1.2, -0.4, -0.9], dtype=torch.float64).expand(4, 3).contiguous()
    rollouts = Rollouts.build([[1, 2]] * 4, [[3, 4, 5]] * 4, [0] * 4).replace(
        rewards=rewards,
        sampler_logprobs=old,
        truncated=torch.zeros(4, dtype=torch.bool),
        answers=("7", "8", "9", "8"),
        prompts=({},) * 4,
        extras={
            "reference_rewards": torch.tensor([0.0, 1.0, 0.0, 0.0], dtype=torch.float64),
            "answer_mask": torch.tensor([[False, False, True]] * 4),
        },
    )
    generator = torch.Generator().manual_seed(0)
    return rollouts, Signals(
        logprobs=old + torch.tensor([0.7, 1.0, 1.4], dtype=torch.float64).log(),
        old_logprobs=old,
        ref_logprobs=old - 0.05,
        entropies=torch.tensor([1.6, 0.3, 0.8], dtype=torch.float64).expand(4, 3).contiguous(),
        values=torch.full((4, 3), 0.25, dtype=torch.float64),
        old_values=torch.full((4, 3), 0.25, dtype=torch.float64),
        extras={name: signal_example(name, 4, 3, generator) for name in signal_names()},
    )
