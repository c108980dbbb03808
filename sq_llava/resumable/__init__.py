"""Work that goes on after a kill: lines that may be cut off, the note of a run, what was written before."""
