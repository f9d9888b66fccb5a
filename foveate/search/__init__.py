"""Search: a budget or a tolerance in, a recipe out."""
