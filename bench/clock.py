"""The minutes that a run has. Apart from gpu.py, which as a script is `__main__`: what is sent to another process must have a name there."""

import time


class Clock:
    """The budget of a whole run. Past `early` of it nothing more is compiled, past `patient` nobody waits for what is compiled still, past `late` no case is begun, nor where
    the longest so far would not end in time: what is left out is said."""

    late = 0.9

    def __init__(self, minutes: float, steps: bool):
        self.started, self.seconds, self.early = time.monotonic(), 60 * minutes, 0.5 if steps else 0.4
        self.patient = self.early + 0.15

    def left(self, share: float) -> float:
        """Seconds until so much of it is over."""
        return share * self.seconds - (time.monotonic() - self.started)

    def before(self, share: float) -> bool:
        return self.left(share) > 0

    def full(self, longest: float) -> str:
        """Why no case is begun any more, where one took `longest` seconds; empty where one is."""
        if not self.before(self.late):
            return f"the run has used {self.late:.0%} of its time"
        return "" if self.left(1) > longest else f"the run has {self.left(1):.0f} s left, and a case took {longest:.0f}"

    def reason(self) -> str:
        """Why nothing is compiled any more; empty where it is."""
        return "" if self.before(self.early) else f"the run has used {self.early:.0%} of its time"
