"""The loss head against its peers: time, memory and accuracy, each provider in its own process."""
