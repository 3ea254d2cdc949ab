"""A handwritten GRPO trainer for ultra-long writing; importing it imports nothing else."""
