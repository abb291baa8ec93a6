"""An interval of a run, counted in optimizer steps, epochs or seconds. No torch."""

import math
import re
from dataclasses import dataclass

from megabatch.errors import SettingsError

_FORM = re.compile(r"(\d+(?:\.\d+)?) *(steps?|epochs?|s|min|h)")
_SECONDS = {"s": 1.0, "min": 60.0, "h": 3600.0}


@dataclass(frozen=True)
class Interval:
    """One of the three lengths is set, or none: an interval that never ends."""

    steps: int = 0
    epochs: float = 0.0
    seconds: float = 0.0

    def crossed(self, before: float, after: float) -> bool:
        """True if a multiple of the interval's steps or epochs lies in (before, after], both in that unit."""
        length = self.steps or self.epochs
        return bool(length) and math.floor(after / length + 1e-9) > math.floor(before / length + 1e-9)


def parse_interval(option: str, text: str) -> Interval:
    """Returns the interval of "100steps", "2epochs", "90s", "10min", "1h" or "never".

    Raises:
        SettingsError: `text` has another form, or is 0; the message names `option`.
    """
    if text == "never":
        return Interval()
    found = _FORM.fullmatch(text)
    length, unit = (float(found[1]), found[2].removesuffix("s") or "s") if found else (0.0, "")
    if length == 0 or (unit == "step" and not length.is_integer()):
        needed = "a number above 0 with a unit, as 100steps, 2epochs, 90s, 10min or 1h, or never"
        raise SettingsError(f"{option} {text}: needed {needed}; {option} 10min works")
    if unit == "step":
        return Interval(steps=int(length))
    return Interval(epochs=length) if unit == "epoch" else Interval(seconds=length * _SECONDS[unit])
