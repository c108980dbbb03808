"""The commands of `sq-llava`. No other package imports this one."""
