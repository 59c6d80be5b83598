"""The prompt sets, the batch that flows through a step, and its packing into micro-batches."""
