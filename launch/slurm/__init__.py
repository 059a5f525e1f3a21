"""`counterflow launch`: a run on the nodes of a Slurm job, or on this machine.

The script that is submitted, the order of the nodes, and what runs on each of them. May import what
`launch` may; imports nothing at once.
"""
