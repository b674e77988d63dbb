"""Who owns which block, and how gradients and updates travel."""
