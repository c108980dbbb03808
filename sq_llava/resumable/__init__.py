"""Resumable work: JSON lines that a kill may cut off, the loop that resumes from them, the note of a run."""
