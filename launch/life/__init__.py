"""How a run goes on, stops and fails: signals, hangs, lost processes, losses that go wrong.

May import what `launch` may; imports nothing at once.
"""
