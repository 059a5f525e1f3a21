"""The report's colours: CSS variable -> colour, on a light page and on a dark one.

Those of the steps, and of the page around them, are the ones of every picture of steps.
"""

from ..parallel.simulate.draw import look

LIGHT = {**look.LIGHT, "first": "#1f6fb4", "second": "#c2571a"}
DARK = {**look.DARK, "first": "#6db3f2", "second": "#f0945a"}
