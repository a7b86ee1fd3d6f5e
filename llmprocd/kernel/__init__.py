"""What is true: no I/O, no await, no clock, no chance."""
