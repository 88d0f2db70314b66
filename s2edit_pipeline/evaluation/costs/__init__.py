"""What edits and fits cost: evaluations, seconds and memory."""
