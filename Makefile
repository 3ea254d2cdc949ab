# The same commands as in the README, by name.
PYTHON ?= python3

.PHONY: setup demo test test-vllm reproduce-small
setup demo test:
	$(PYTHON) -m lwz_trainer.bootstrap $@

test-vllm:
	$(PYTHON) tests/real_vllm/run.py

# LONGBENCH: longbench_write_en.jsonl of THUDM/LongWriter's evaluation folder.
reproduce-small:
	$(PYTHON) -m lwz_trainer.bootstrap $@ --longbench "$(LONGBENCH)"
