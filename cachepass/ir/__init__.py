"""The vocabulary of rewritten graphs: operations, boundaries, printer, verifier."""
