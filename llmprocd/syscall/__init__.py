"""The trap: check the caller and the arguments, then one call into the kernel."""
