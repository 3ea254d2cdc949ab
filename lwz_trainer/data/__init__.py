"""Writing requests and the templates that turn them into text for the policy."""
