"""Makes instruction data: one module for each way, and what they share."""
