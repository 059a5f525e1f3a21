"""The report's colours: CSS variable -> colour, on a light page and on a dark one.

F, B, I and W are the kinds of steps; they differ in lightness, not only in hue.
"""

LIGHT = {
    "paper": "#fefffe",
    "ink": "#1d2129",
    "faint": "#6f7683",
    "grid": "#dfe2e8",
    "first": "#1f6fb4",
    "second": "#c2571a",
    "F": "#f2c14e",
    "B": "#4c8abb",
    "I": "#8fcfcf",
    "W": "#a98bd0",
}
DARK = {
    "paper": "#15181d",
    "ink": "#e4e7ec",
    "faint": "#969eac",
    "grid": "#2f353f",
    "first": "#6db3f2",
    "second": "#f0945a",
    "F": "#d9a934",
    "B": "#5b97c6",
    "I": "#7fbcbc",
    "W": "#a98bd0",
}
