"""Checkpoints in the memory of the nodes, beside those on disk: they outlive processes, but not all nodes.

Each process writes its part of the state to a memory file system of its node, and to that of the next node, so that a
run goes on from there after a process or a node was lost.
"""
