"""Checkpoints that resume a run exactly, and the folder of a run."""
