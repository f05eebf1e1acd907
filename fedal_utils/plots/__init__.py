"""How it looks: every figure."""
