"""Whether a recipe fits a cluster, what limits it, how much it moves and how long it takes, without a GPU.

Counts, activations, operations and traffic between ranks are read off the real Megatron models: `meta_step` measures
one rank's training step on the meta device in a pretended world. `memory` adds up what each phase holds, `work` what a
step does, `search` looks for the smallest change that makes a recipe fit and for the fewest nodes.
"""
