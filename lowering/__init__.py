"""What only a compiler can do for the ops: rewrites of the captured graph, and reports on it."""
