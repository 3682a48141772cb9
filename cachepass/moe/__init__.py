"""Layers of routed experts: found before capture, and computed as one operation."""
