"""A program for a Python that has PyTorch and nothing else; `test_torch_only.py` runs it in two such Pythons.

Imports every module of the core and the catalog, then runs a preset and prints what it did to each token.
Importing the packages that are named as arguments fails, as if they were not installed.
"""

from __future__ import annotations

import importlib
import importlib.abc
import json
import pkgutil
import sys

UPPER = {"cli", "policy", "report", "rollout", "tasks", "train"}


class Absent(importlib.abc.MetaPathFinder):
    """Refuses the packages in `names`."""

    def __init__(self, names: set[str]) -> None:
        self.names = names

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name.partition(".")[0] in self.names:
            raise ModuleNotFoundError(f"No module named {name!r} (blocked by the test)", name=name)


def main() -> None:
    sys.meta_path.insert(0, Absent(set(sys.argv[1:])))
    import torch

    import tokenloom

    core = [m.name for m in pkgutil.iter_modules(tokenloom.__path__) if m.name not in UPPER]
    for name in core:
        importlib.import_module(f"tokenloom.{name}")
    from tokenloom import catalog
    from tokenloom.algorithm import Algorithm
    from tokenloom.batch import Rollouts
    from tokenloom.signals import Signals

    rollouts = Rollouts.build([[1, 2]] * 4, [[3, 4]] * 4, [0] * 4)
    rollouts = rollouts.replace(rewards=torch.tensor([1.0, 0.0, 0.0, 0.0]))
    logprobs = torch.full((4, 2), -0.5)
    signals = Signals(logprobs=logprobs, old_logprobs=logprobs, ref_logprobs=logprobs)
    found = Algorithm.from_recipe("grpo").coefficients(rollouts, signals)
    result = {
        "coefficients": found["logprobs"].tolist(),
        "methods": len(catalog.methods()),
        "core": core,
        "loaded": sorted({n.partition(".")[0] for n in sys.modules}),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
