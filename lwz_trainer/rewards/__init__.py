"""Rewards of LongWriter-Zero and the advantages made of them.

`score.py` is the way in: it scores samples. `advantages.py` turns the scores into advantages.
"""
