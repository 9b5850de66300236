"""Execution of a block: the planner, its forward and backward programs, and their interpreter."""
