"""The project as a whole: its layout, its wheel, its peers, the demo and the benchmarks."""
