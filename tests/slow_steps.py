"""An engine whose steps take a while: what a test does while an answer is under way comes before its end."""

import time
from typing import Any

from longforge.engine import Engine

SECONDS = 0.005


class SlowEngine(Engine):
    def step(self) -> Any:
        time.sleep(SECONDS)
        return super().step()


SLOW_STEPS = f"""
import time
from longforge.engine import Engine

step = Engine.step


def slow(self):
    time.sleep({SECONDS})
    return step(self)


Engine.step = slow
"""
"""The same for a server of its own: Python that its process runs first."""
