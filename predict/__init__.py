"""What a run will take, before it runs: step time, memory, and the best layout. No torch.

`cluster` and `calibration` say what a machine gives, `layout` how a model is spread over it, `work`
what each phase has to do, `times` how long that takes, `step` what a whole step comes to, `ranks`
the same of every rank by itself, `search` which layout is best. May import `model`, `comm` and
`parallel`, as far as these need no torch.
"""
