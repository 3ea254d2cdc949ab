"""`generate`: a checkpoint writes one piece on the terminal, or a file of them."""
