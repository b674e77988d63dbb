"""shampoo_core."""
