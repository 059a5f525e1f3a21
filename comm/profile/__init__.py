"""Traces in, overlap report out: how much communication was exposed, in which phase, and why.

`read` makes values of a trace, `analyse` a report of one rank, `ranks` compares ranks, `against`
lays a run beside its simulation. Imports the standard library alone: no torch.
"""
