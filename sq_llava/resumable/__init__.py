"""Resumable work: JSON lines that a kill may cut off, the loop that resumes from them, and the note of a run."""
