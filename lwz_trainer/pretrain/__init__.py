"""`pretrain`: cross-entropy on a mixture of texts, and on replies to prompts."""
