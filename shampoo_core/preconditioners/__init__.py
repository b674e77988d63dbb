"""One file per preconditioning method."""
