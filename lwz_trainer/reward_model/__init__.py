"""Bradley–Terry training of a writing reward model (`python -m lwz_trainer reward-model`)."""
