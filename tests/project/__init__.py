"""Tests of the project as a whole: layout, wheel, other libraries, demo and benchmarks."""
