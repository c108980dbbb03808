"""Examples with real models. Each folder has a README.md."""
