"""What is looked at before ranks start: machines, versions, disk, bandwidth, memory.

May import what `launch` may; imports nothing at once.
"""
