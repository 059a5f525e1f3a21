"""A simulated step to look at: pictures, a page to zoom in, a trace, a drawing for the terminal.

`look` says how each kind of step looks, `bars` what happens on which lane. `plot` (with its parts
`plot_legend`, `plot_memory` and `paint`) and `figures` make SVG and PNG and are, but for `paint`,
the only modules that need matplotlib; `page` makes HTML, `trace` Perfetto's JSON, `text` the
terminal's timeline, and `pictures` picks by a file's suffix.
"""
