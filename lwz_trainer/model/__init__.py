"""The policy network: architecture, forward pass, loading and export."""
