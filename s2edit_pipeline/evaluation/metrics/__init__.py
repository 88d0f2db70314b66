"""What a picture is worth: pixels, learned distances, the attribute classifier, drawn truths, intervals."""
