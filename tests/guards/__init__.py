"""Known ways to get sequence parallelism wrong, each put into the code to see a test fail."""
