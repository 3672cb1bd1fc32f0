"""Plain decoding as a loop: one token at a time, as `generate` does, over a session."""

from __future__ import annotations

import torch

from tokenloom.decode.registry import decoder
from tokenloom.decode.run import Loop, Run


@decoder("plain", kind="loop")
class Plain(Loop):
    """One token per forward: what every other loop is compared with."""

    def rows(self, run: Run) -> list[list[int]]:
        """See `Loop`."""
        generated: list[list[int]] = [[] for _ in range(len(run))]
        live = list(range(len(run)))
        with run.session() as session:
            scores = session.start()
            while True:
                chosen = run.choose(live, [generated[r] for r in live], scores)
                running = run.append(live, generated, chosen)
                if not running:
                    return generated
                if len(running) < len(live):
                    session.branch(running)
                live = [live[i] for i in running]
                scores = session.step(torch.tensor([chosen[i] for i in running]))
