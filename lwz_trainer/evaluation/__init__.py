"""The paper's three evaluations: WritingBench, Arena-Write and LongBench-Write."""
