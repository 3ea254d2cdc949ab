# The same commands as in the README, by name.
PYTHON ?= python3

.PHONY: setup demo test
setup demo test:
	$(PYTHON) -m lwz_trainer.bootstrap $@
