"""Checkpoints of a run: written beside the training, whole or not at all, verified when read.

They go through torch.distributed.checkpoint, lie in safetensors files under a manifest in JSON, and
know nothing of the layout that wrote them. May import what `launch` may; imports nothing at once.
"""
