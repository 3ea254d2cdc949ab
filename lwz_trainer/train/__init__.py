"""`train`: the GRPO loop and everything that a run writes."""
