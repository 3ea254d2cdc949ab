# The same commands as in the README, by name.
PYTHON ?= python3

.PHONY: setup demo test test-vllm
setup demo test:
	$(PYTHON) -m lwz_trainer.bootstrap $@

test-vllm:
	$(PYTHON) tests/real_vllm/run.py
