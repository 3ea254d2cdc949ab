"""From scored samples to changed weights: packing, loss, optimizer."""
