"""How a run starts, lives and ends.

`cli` is the command line, `config` and `settings` the configuration, `data` and `tokens` the text,
`optim` and `ramps` the optimisation, `trainer` the run itself, `report` what it leaves behind. The
topmost room: it may import every other, and none imports it. The only room that prints.
"""
