"""Makes instruction data: one module for each way, and the modules that they share."""
