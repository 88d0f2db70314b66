"""One question each about the model and the method: base model, inversions, edits, fits, compositions."""
